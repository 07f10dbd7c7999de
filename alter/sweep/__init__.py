"""``alter sweep``: one recipe with some of its values varied, each point a run of its own, ranked by validation.

``points.py`` says which points there are and checks them, ``plan.py`` writes their recipes into the sweep's folder,
``cell.py`` runs one, ``run.py`` all of them here or on SLURM, ``table.py`` shows where they stand, ``main.py`` is the verb.
"""
