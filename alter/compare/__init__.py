"""``alter compare``: methods of tuning one backbone on many tasks, through the same data, budget and metrics.

``methods.py`` says what each method does to a recipe, ``grid.py`` runs methods x seeds, ``cell.py`` one of them,
``summary.py`` turns the cells' answers into ``compare.json``, ``tables.py`` draws it.
"""
