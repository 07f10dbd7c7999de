"""A recipe: read from YAML files and flags, checked as a whole, split into what each stage takes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer

from alter.data import MultiTaskDataModule, Task, load_tasks
from alter.errors import AlterError, did_you_mean
from alter.nn import TrunkCache
from alter.nn.backbone import is_seq2seq, whole_name
from alter.nn.decoding import Generation
from alter.precision import choose_precision
from alter.recipe_file import DATA_SKIP, SET_BY_RUN, STAGES, TRAINER_SKIP, check_content, read_content
from alter.recipe_values import check_lengths, check_ranges, check_values
from alter.schema import find_classes_in, import_name, named_arguments, same_class, template_base
from alter.shipped import shipped_recipes
from alter.stage_settings import stage_epochs, stage_trainer, trunk_cache
from alter.stages import StageModule
from alter.yaml_file import dump

DEFAULTS = {  # named here too, so that their arguments are flags even where a recipe leaves the class out
    "stage1": {"expert": {"class_path": "alter.nn.LoRA"}, "router": {"class_path": "alter.nn.TaskSelector"}},
    "stage2": {"expert": {"class_path": "alter.nn.LoRA"}, "router": {"class_path": "alter.nn.SharedGate"}},
}
PRINT = "--print_config"
SECTIONS = ("trunk_cache", "generation", "data", "trainer", *STAGES)


def recipe_parser() -> ArgumentParser:
    """The parser of ``alter fit``: every field of a recipe is a flag, with help from the docstrings."""
    parser = ArgumentParser(
        prog="alter fit",
        usage="alter fit --config RECIPE [--config OVERLAY ...] [--KEY VALUE ...]",
        description="Trains a two-stage MTA model from a recipe.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A recipe; give it again to lay another over it.")
    parser.add_argument("--run", type=str, default="runs/model", help="The run folder.")
    parser.add_argument("--stages", type=list[str], default=list(STAGES), help="What to run: stage1, stage2 or both.")
    parser.add_argument("--test", type=bool, default=True, help="Whether to test at the end.")
    parser.add_argument("--seed_everything", type=int, default=13, help="Seed of all random numbers.")
    parser.add_argument("--backbone", type=str, default="smollm2-135m", help="A hub id, a folder or a bundled name.")
    parser.add_argument(
        "--precision",
        type=str,
        default="fp32",
        help="Of the frozen backbone: fp32, bf16, int8, nf4, or auto: bf16 where the machine is fast in it, else fp32.",
    )
    parser.add_class_arguments(TrunkCache, "trunk_cache", instantiate=False, fail_untyped=False)
    parser.add_class_arguments(Generation, "generation", instantiate=False, fail_untyped=False)
    parser.add_class_arguments(MultiTaskDataModule, "data", skip=DATA_SKIP, instantiate=False, fail_untyped=False)
    parser.add_class_arguments(Trainer, "trainer", skip=TRAINER_SKIP, instantiate=False, fail_untyped=False)
    for name, module in STAGES.items():
        parser.add_subclass_arguments(
            (module, StageModule), f"{name}.model", skip=SET_BY_RUN, instantiate=False, fail_untyped=False
        )
        parser.set_defaults(
            {f"{name}.model": {"class_path": f"alter.stages.{module.__name__}", "init_args": DEFAULTS[name]}}
        )
        parser.add_argument(
            f"--{name}.trainer", type=dict[str, Any], default={}, help=f"Trainer arguments for {name} alone."
        )
    return parser


@dataclass
class Recipe:
    """A checked recipe.

    Attributes:
        config: all of its values, plain.
        tasks: in the order of their ids.
        text: the complete YAML, with the tasks inline, as the run folder keeps it.
    """

    config: dict[str, Any]
    tasks: list[Task]
    text: str

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.config["run"]).expanduser()

    def epochs_before(self, stage: str) -> int:
        """Epochs of the mixture that the stages before this one draw, whole or in part."""
        before = list(STAGES)[: list(STAGES).index(stage)]
        return sum(stage_epochs(stage_trainer(self.config, name)) or 1 for name in before)

    def data_args(self, tokenizer: str, seq2seq: bool) -> dict[str, Any]:
        """Arguments for ``MultiTaskDataModule``."""
        return {**self.config["data"], "tasks": self.tasks, "tokenizer": tokenizer, "seq2seq": seq2seq}

    def open_data(self, backbone: Path) -> MultiTaskDataModule:
        """The data, encoded for a backbone and opened.

        Raises:
            AlterError: rows do not fit their task, or tasks the backbone.
        """
        check_lengths(self.tasks, backbone)
        data = MultiTaskDataModule(**self.data_args(str(backbone), is_seq2seq(backbone)))
        data.setup()
        return data

    def stage_args(self, stage: str, backbone: str) -> dict[str, Any]:
        """What one LightningCLI takes for a stage: ``seed_everything``, ``trainer`` and ``model``."""
        model = copy.deepcopy(self.config[stage]["model"])
        arguments = model.setdefault("init_args", {})
        arguments |= {
            "backbone": backbone,
            "tasks": [task.name for task in self.tasks],
            "precision": self.config["precision"],
            "trunk_cache": trunk_cache(self.config),
        }
        if stage == "stage2":
            arguments["start_from"] = str(self.run / "stage1" / "model")
        return {
            "seed_everything": self.config["seed_everything"],
            "trainer": stage_trainer(self.config, stage),
            "model": model,
        }


def recipe_arguments(files: Sequence[str], flags: Sequence[str]) -> list[str]:
    """What ``alter fit`` would be given for recipe files and further flags, of a command that has options of its own."""
    return [*(part for file in files for part in ("--config", file)), *flags]


def read_recipe(arguments: Sequence[str], here: bool = True) -> Recipe:
    """Reads and checks a recipe.

    Args:
        arguments: of ``alter fit``: ``--config FILE`` and flags.
        here: whether it runs on this machine; what depends on the machine stays open for one that runs on another.

    Raises:
        AlterError: with every mistake found, before anything is loaded or written.
        SystemExit: after ``--print_config`` among the arguments, which prints the recipe.
    """
    printed = [a for a in arguments if a.partition("=")[0] == PRINT]
    if printed and printed[-1] not in (PRINT, f"{PRINT}=comments", f"{PRINT}=skip_default"):
        raise AlterError(f"the command line: {printed[-1]}: it takes skip_default, or nothing.")
    arguments = [a for a in arguments if a not in printed]
    arguments = [_find_config(a, previous) for a, previous in zip(arguments, [None, *arguments[:-1]], strict=True)]
    files = [Path(value) for flag, value in _flag_values(arguments) if flag == "--config"]
    for folder in dict.fromkeys([Path(), *(file.parent for file in files)]):  # modules are looked for in this order
        find_classes_in(folder)
    contents, problems = _read_files(files)
    parser = recipe_parser()
    config: Namespace | None = None
    tasks: list[Task] = []
    try:
        config = parser.parse_args(arguments)
    except AlterError as error:
        problems += [] if problems else error.messages
    except Exception as error:
        if not problems:  # what the files have right may still be wrong on the command line
            problems += _stage_flags(arguments) or [
                _unknown_flag(error, parser) or _one_sentence(error, ", ".join(map(str, files)) or "the command line")
            ]
    if config is not None and not all(isinstance(config.get(key), Namespace) for key in SECTIONS):
        # Of a section that is empty or no mapping nothing else can be said.
        raise AlterError(
            *(problems or [f"the recipe: each of {', '.join(SECTIONS)} is a mapping of settings; write them so."])
        )
    try:
        root = config.data.root if config is not None else None
        tasks = load_tasks(*_task_entries(config, contents, arguments), root)
    except AlterError as error:
        problems += error.messages
    if config is not None:
        _restore_defaults(config, [content for _, content in contents], _flag_values(arguments))
        if printed:  # not by the parser itself, which knows nothing of these defaults
            options = {"skip_unset": False, "with_comments": True, "skip_validation": True}
            print(parser.dump(config, **options, skip_default=printed[-1].endswith("=skip_default")), end="")
            raise SystemExit
        plain = config.as_dict()
        problems += check_values(plain)
        problems += [] if problems else check_ranges(plain, len(tasks))
    if problems or config is None:
        raise AlterError(*dict.fromkeys(problems))
    return _complete(parser, config, tasks, here)


def _restore_defaults(config: Namespace, contents: Iterable[Any], flags: Sequence[tuple[str, str]]) -> None:
    """Gives an argument that nobody has named for the class its own default.

    The parser takes over what the class that stood there before has under the same name, be it the default one or an earlier
    file's: for an ``AdjacentSelector`` without arguments it would be the temperature of ``TaskSelector``.
    """
    for stage, parts in DEFAULTS.items():
        for part, default in parts.items():
            chosen = config.get(f"{stage}.model.init_args.{part}")
            arguments = chosen.get("init_args") if isinstance(chosen, Namespace) else None
            if arguments is None:
                continue
            before, named, changed = default["class_path"], set[str](), False
            said = (_part_of(content, stage, part) for content in [*contents, *_contents_of(flags)])
            for given in [*said, {"class_path": chosen.class_path}]:
                if not same_class(given.get("class_path", before), before):
                    before, named, changed = given["class_path"], set(), True
                named |= (given.get("init_args") or {}).keys()
            if not changed:
                continue
            for flag, _ in flags:
                keys = _keys_of(flag)
                if keys[:-1] == [stage, "model", part]:
                    named.add(keys[-1])
            for name, own in named_arguments(import_name(chosen.class_path, stage)).items():
                if name in arguments and name not in named and own.default is not own.empty:
                    arguments[name] = own.default


def _contents_of(flags: Sequence[tuple[str, str]]) -> Iterable[Any]:
    """What flags with a mapping say, such as ``--stage1.model.router '{class_path: ..., init_args: ...}'``, as a file would."""
    for flag, value in flags:
        keys = _keys_of(flag)
        if keys[0] in DEFAULTS and value.lstrip().startswith("{"):
            content = yaml.safe_load(value)
            for key in reversed([*keys[:2], *(["init_args"] if keys[2:] else []), *keys[2:]]):
                content = {key: content}
            yield content


def _keys_of(flag: str) -> list[str]:
    """The keys that a flag names, without ``init_args``, which may be left out."""
    return flag.removeprefix("--").replace(".init_args", "").split(".")


def _part_of(content: Any, stage: str, part: str) -> Mapping[str, Any]:
    """What a recipe file says of a stage's expert or router."""
    for key in (stage, "model", "init_args", part):
        content = content.get(key) if isinstance(content, Mapping) else None
    return {"class_path": content} if isinstance(content, str) else content if isinstance(content, Mapping) else {}


def _read_files(files: Sequence[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """What the recipe files say, in their order, and what is wrong with it."""
    contents: list[tuple[Path, dict[str, Any]]] = []
    problems: list[str] = []
    unreadable: list[str] = []
    for file in files:
        try:
            contents.append((file, read_content(file)))
            problems += check_content(contents[-1][1], str(file))
        except AlterError as error:
            unreadable += error.messages
    if unreadable:  # the parser would read it all the same, and some files are made to keep it at that
        raise AlterError(*problems, *unreadable)
    return contents, problems


def _complete(parser: ArgumentParser, config: Namespace, tasks: list[Task], here: bool) -> Recipe:
    config.data.tasks = []
    plain = json.loads(parser.dump(config, skip_unset=False, skip_validation=True, format="json"))
    plain["data"]["tasks"] = [task.to_dict() for task in tasks]
    if plain["data"]["root"] is not None:  # whole, so that the run can be tested from another folder
        plain["data"]["root"] = str(Path(plain["data"]["root"]).expanduser().resolve())
    plain["stages"] = [stage for stage in STAGES if stage in plain["stages"]]  # however they are listed
    plain.pop("config", None)
    plain["precision"] = choose_precision(plain, here)
    # in the run, as whole as the paths of data: it is used from other folders too
    return Recipe(plain, tasks, dump({**plain, "backbone": whole_name(plain["backbone"])}))


def _flag_values(arguments: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            pairs.append((flag, value if equals else arguments[i + 1] if i + 1 < len(arguments) else ""))
    return pairs


def _find_config(argument: str, previous: str | None) -> str:
    """Where ``--config`` names a recipe that is not there, takes the one of this name that ships with ALTER."""
    if previous != "--config" and not argument.startswith("--config="):
        return argument
    name = argument.removeprefix("--config=")
    if Path(name).is_file():
        return argument
    shipped = shipped_recipes()
    for candidate in (Path(name), Path(name).relative_to("recipes") if name.startswith("recipes/") else Path(name)):
        for file in (shipped / candidate, shipped / f"{candidate}.yaml"):
            if file.is_file():
                return argument.replace(name, str(file))
    known = [str(p) for p in Path(name).parent.glob("*.yaml")] + [p.stem for p in shipped.glob("*.yaml")]
    raise AlterError(f"{name}: no such recipe; name a YAML file or a shipped recipe.{did_you_mean(name, known)}")


def _task_entries(
    config: Namespace | None, contents: Sequence[tuple[Path, Mapping[str, Any]]], arguments: Sequence[str]
) -> tuple[list[Any], Path]:
    """The tasks as they are listed, and the folder that their paths start from: that of the file that lists them."""
    if config is not None and any(argument.startswith("--data.tasks") for argument in arguments):
        return list(config.data.tasks or []), contents[0][0].parent if contents else Path()
    # From the files themselves: jsonargparse takes a label such as "yes" for true. A recipe with mistakes still has its
    # tasks checked.
    for file, content in reversed(contents):
        data = content.get("data")
        if isinstance(data, dict) and isinstance(data.get("tasks"), list):
            return data["tasks"], file.parent
    return [], Path()


def _stage_flags(arguments: Sequence[str]) -> list[str]:
    """What is wrong with flags of a stage's model, of which the parser says neither which it is nor what would do."""
    problems = []
    for flag, value in _flag_values(arguments):
        found = re.fullmatch(r"--(stage[12])\.model\.(?:init_args\.)?(\w+)", flag)
        if found is None or found[2] == "class_path":
            continue
        known = [key for key in named_arguments(STAGES[found[1]]) if key not in SET_BY_RUN]
        where = f"the command line: {flag}"
        if found[2] not in known:
            problems.append(
                f"{where}: {found[1]} has no '{found[2]}'; it takes {', '.join(known)}.{did_you_mean(found[2], known)}"
            )
        elif (base := template_base(STAGES[found[1]], found[2])) and not value.startswith("{"):
            try:
                import_name(value, where, base)
            except AlterError as error:
                problems += error.messages
    return problems


def _unknown_flag(error: Exception, parser: ArgumentParser) -> str | None:
    """What to say where the error is a flag that no recipe has, or what is no flag; else None."""
    if found := re.search(r"nrecognized arguments: ([^-\s]\S*)", str(error)):
        remedy = (
            f"name a recipe by --config {found[1]}"
            if Path(found[1]).suffix in (".yaml", ".yml")
            else "quote a value with blanks"
        )
        return f"the command line: '{found[1]}' belongs to no flag; {remedy}."
    found = re.search(r"nrecognized arguments: (--[^\s=]+)", str(error))
    if found is None:
        return None
    known = [option for action in parser._actions for option in action.option_strings]
    return (
        f"the command line: unknown flag '{found[1]}'; --print_config shows all keys of a recipe."
        f"{did_you_mean(found[1], known)}"
    )


def _one_sentence(error: Exception, where: str) -> str:
    """The shortest true line of jsonargparse's long message."""
    text = str(error)
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    unknown = next((line for line in lines if "not accepted" in line or "nrecognized" in line), None)
    return f"{where}: {lines[0]} {unknown or lines[-1] if len(lines) > 1 else ''}".strip()
