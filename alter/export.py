"""``alter export``: a trained model in formats that other programs read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from alter.answering import answer_ends
from alter.card import model_card
from alter.data import Task
from alter.data.encode import prompt_ids
from alter.errors import AlterError, did_you_mean, in_short
from alter.loading import CALIBRATION_FILE, answered_tasks, model_folder, run_recipe
from alter.nn.backbone import QUANTISED, load_backbone, load_tokenizer, resolve_backbone
from alter.nn.collapse import joined_experts, merged, one_adapter
from alter.nn.decoding import Generation, end_tokens
from alter.nn.files import WEIGHTS_FILE, read_config
from alter.nn.hub import weight_files
from alter.nn.model import MTAModel
from alter.publish import example_call, publish, write_recipe
from alter.writing import made_whole, refuse_full

# Messages for which a chat template has to make a task's prompts: of several lines, with blanks around, and long.
SAMPLES = ("one line\n  and another", " ends in blanks \n", "long " * 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HF_USAGE = """
A plain checkpoint: transformers, or what reads its checkpoints, is all it needs.

```python
from transformers import {auto}, AutoTokenizer

model, tokenizer = {auto}.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]{cut}, skip_special_tokens=True))
```
"""
ONNX_USAGE = """
A graph for ONNX Runtime: from tokens and a cache of keys and values, empty at first, to logits and the longer cache.

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer, GenerationConfig

graph, tokenizer = onnxruntime.InferenceSession("FOLDER/model.onnx"), AutoTokenizer.from_pretrained("FOLDER")
settings = GenerationConfig.from_pretrained("FOLDER")
caches = [given for given in graph.get_inputs() if "past_key_values" in given.name]
cache = {given.name: np.zeros((1, int(given.shape[1]), 0, int(given.shape[3])), np.float32) for given in caches}
ids = tokenizer(PROMPT, return_tensors="np")["input_ids"]
seen, answer = 0, []
while len(answer) < settings.max_new_tokens:
    seen += ids.shape[1]
    places = np.arange(seen - ids.shape[1], seen)[None]
    mask = np.ones((1, seen), np.int64)
    logits, *states = graph.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": places, **cache})
    ids, cache = logits[:, -1:].argmax(-1), dict(zip(cache, states))
    if ids[0, 0] in settings.eos_token_id:
        break
    answer.append(ids[0, 0])
print(tokenizer.decode(answer, skip_special_tokens=True))
```
"""
ONNX_SEQ2SEQ_USAGE = """
Two graphs for ONNX Runtime: of the encoder, and of the decoder with its head, which has no cache.

```python
import numpy as np
import onnxruntime
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

encoder, decoder = (onnxruntime.InferenceSession(f"FOLDER/{part}.onnx") for part in ("encoder", "decoder"))
tokenizer, settings = AutoTokenizer.from_pretrained("FOLDER"), GenerationConfig.from_pretrained("FOLDER")
given = dict(tokenizer(PROMPT, return_tensors="np"))
asked = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
(states,) = encoder.run(None, asked)
answer = [settings.decoder_start_token_id]
while len(answer) <= settings.max_new_tokens:
    read = {"decoder_input_ids": np.array([answer]), "encoder_outputs.last_hidden_state": states}
    (logits,) = decoder.run(["logits"], {**read, "attention_mask": asked["attention_mask"]})
    if (token := int(logits[0, -1].argmax())) in settings.eos_token_id:
        break
    answer.append(token)
print(tokenizer.decode(answer[1:], skip_special_tokens=True))
```
"""
ADAPTER_USAGE = """
```python
import alter

print(alter.load("FOLDER").{call})
```
"""


class Exporter:
    """Writes the tasks of one run.

    Args:
        run: the run folder.
        out: for one folder a task; by default ``export/FORMAT`` in the run.
        stage: whose model; by default that of the last.
        backbone: where the backbone is, when not where it was.

    Raises:
        AlterError: there is no finished run or no such stage.
    """

    def __init__(
        self, run: Path, out: Path | None = None, stage: str | None = None, backbone: str | None = None
    ) -> None:
        self.run, self.out = run, out
        self.content = run_recipe(run)
        self.folder = model_folder(run, stage)
        self.entries = {entry["name"]: entry for entry in self.content["data"]["tasks"]}
        self.config = {**read_config(self.folder), "tasks": answered_tasks(run, self.folder)}
        self.backbone = backbone

    def write(self, form: str, names: Sequence[str] = (), dtype: str = "fp32") -> list[Path]:
        """Writes the model in one format, and prints the sizes before and after.

        Args:
            form: ``hf`` (one plain checkpoint a task), ``adapter`` (one adapter a task), ``onnx`` (one graph a task) or
                ``alter`` (the whole model, for the hub).
            names: of the tasks; by default all.
            dtype: of a plain checkpoint.

        Returns:
            the folders written.

        Raises:
            AlterError: the model does not fit the format, a task is unknown, or a folder is not empty; nothing is written then.
        """
        out = self.out or self.run / "export" / form
        if form != "hf" and dtype != "fp32":
            raise AlterError(f"--dtype: {dtype} is for --format hf; {form} keeps the weights as they are, in fp32.")
        if form == "alter":
            if names or self.folder != model_folder(self.run):
                raise AlterError("--format alter writes the whole model; leave out --task and --stage.")
            if self.backbone is not None:
                raise AlterError(
                    "--format alter names the backbone as the run does; leave out --backbone, and give it where the folder is loaded."
                )
            publish(self.run, out)
            print(
                f"{out}: {_megabytes([out / WEIGHTS_FILE])} of adapters, all tasks; the backbone is named, not copied."
            )
            return [out]
        for name in names:
            if name not in self.config["tasks"]:
                raise AlterError(
                    f"--task: there is no task '{name}'; it is one of {', '.join(self.config['tasks'])}."
                    f"{did_you_mean(name, self.config['tasks'])}"
                )
        names = names or self.config["tasks"]
        for name in names:
            refuse_full(out / name)
        if self.content["precision"] in QUANTISED:
            print(
                f"The run trained beside a backbone in {self.content['precision']}; what is written has its full weights, so "
                "answers may differ slightly."
            )
        where = resolve_backbone(self.backbone or self.config["backbone"]["name"])
        model = MTAModel.from_pretrained(self.folder, str(where), "fp32").requires_grad_(False)
        _refuse_unfit(model, form, names)
        before = [*weight_files(where), self.folder / WEIGHTS_FILE]
        write = {"hf": self._plain, "adapter": self._adapter, "onnx": self._onnx}[form]
        written = []
        for name in names:
            folder, task = out / name, Task.from_dict(self.entries[name], str(self.run / "recipe.yaml"))
            with made_whole(folder) as beside:
                write(model, task, beside, where, dtype)
                for weights in beside.glob("*.safetensors"):
                    shutil.copymode(beside / "README.md", weights)  # safetensors leaves them to their owner alone
            kinds = ("*.safetensors", "*.onnx", "*.data")
            after = [file for kind in kinds for file in folder.glob(kind)]
            print(
                f"{folder}: {_megabytes(after)} ({_megabytes(before)} before: backbone and the adapters of all tasks)"
            )
            if task.choices and form != "adapter":
                print(f"{folder}: other programs write its answers and do not choose, so an answer may be no choice.")
            if form == "onnx" and not task.choices and self._beams():
                print(
                    f"{folder}: the loop in its README.md answers greedily, the run with {self._beams()['num_beams']} beams."
                )
            written.append(folder)
        return written

    def _plain(self, model: MTAModel, task: Task, out: Path, where: Path, dtype: str) -> None:
        with merged(model, task.name) as backbone:
            backbone.save_pretrained(out)
        auto = AutoModelForSeq2SeqLM if model.is_seq2seq else AutoModelForCausalLM
        if dtype != "fp32":
            auto.from_pretrained(out, dtype=DTYPES[dtype]).save_pretrained(out)
        self._add_tokenizer(model.backbone, task, out, where, model.is_seq2seq)
        cut = "" if model.is_seq2seq else '[inputs["input_ids"].shape[1]:]'
        usage = HF_USAGE.format(auto=auto.__name__, prompt=_example(task), cut=cut)
        self._card(usage, task, "transformers").save(out / "README.md")

    def _adapter(self, model: MTAModel, task: Task, out: Path, where: Path, dtype: str) -> None:
        one_adapter(model, task.name, load_backbone(where)).save_pretrained(
            out, self.backbone or self.config["backbone"]["name"]
        )
        write_recipe(out, self.content, [self.entries[task.name]])
        if (self.folder / CALIBRATION_FILE).is_file():
            known = json.loads((self.folder / CALIBRATION_FILE).read_text())
            (out / CALIBRATION_FILE).write_text(json.dumps({k: v for k, v in known.items() if k == task.name}))
        usage = ADAPTER_USAGE.format(call=example_call(task))
        self._card(usage, task, "alter-mta").save(out / "README.md")

    def _onnx(self, model: MTAModel, task: Task, out: Path, where: Path, dtype: str) -> None:
        with _as_graph(model, task.name) as backbone:
            write_onnx(backbone, out)
        self._add_tokenizer(model.backbone, task, out, where, model.is_seq2seq)
        usage = (ONNX_SEQ2SEQ_USAGE if model.is_seq2seq else ONNX_USAGE).replace("PROMPT", repr(_example(task)))
        self._card(usage, task, "onnx").save(out / "README.md")

    def _add_tokenizer(self, backbone: PreTrainedModel, task: Task, out: Path, where: Path, is_seq2seq: bool) -> None:
        """Adds the tokenizer, and how answers are decoded: to a line's end, as ALTER's are."""
        tokenizer = load_tokenizer(where)
        tokenizer.chat_template = None if is_seq2seq else _chat_template(tokenizer, task)
        tokenizer.save_pretrained(out)
        settings = backbone.generation_config.to_dict() | {
            **self._beams(),
            "eos_token_id": sorted(end_tokens(backbone, answer_ends(tokenizer))),
            "pad_token_id": tokenizer.pad_token_id,
            "max_new_tokens": task.max_target_tokens,
            "max_length": None,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        GenerationConfig.from_dict(settings).save_pretrained(out)

    def _beams(self) -> dict[str, Any]:
        return Generation(**self.content.get("generation", {})).options()

    def _card(self, usage: str, task: Task, library: str) -> Any:
        return model_card(self.run, usage, [task.name], library, measured=self.folder == model_folder(self.run))


def _example(task: Task) -> str:
    """A prompt for the card; the template itself where it does more with a field than to print it."""
    try:
        return task.render_prompt(dict.fromkeys(task.fields, "..."))
    except AlterError:
        return task.prompt.strip()


def _chat_template(tokenizer: Any, task: Task) -> str | None:
    """A chat template that makes the task's prompt of the last message; None where none would make the same."""
    if len(task.fields) != 1:
        return None
    (field,) = task.fields
    starts = prompt_ids(["x"], tokenizer, seq2seq=False)[0][:1] == [tokenizer.bos_token_id]
    first = "{{- bos_token -}}\n" if starts else ""
    for end in ("", ".rstrip()"):  # ALTER's prompts end in no blanks
        template = f"{{%- set {field} = messages[-1]['content']{end} -%}}\n{first}{task.prompt.strip()}"
        with contextlib.suppress(TemplateError, AlterError):  # a field whose name is no identifier, or that is no text
            if all(_prompts_alike(tokenizer, task, template, {field: sample}) for sample in SAMPLES):
                return template
    return None


def _prompts_alike(tokenizer: Any, task: Task, template: str, row: dict[str, str]) -> bool:
    """Whether a chat of one message has the text and the tokens of the task's prompt."""
    chat, prompt = [{"role": "user", "content": next(iter(row.values()))}], task.render_prompt(row)
    made = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    ids = tokenizer(made, add_special_tokens=False).input_ids
    return bool(made.endswith(prompt) and ids == prompt_ids([prompt], tokenizer, seq2seq=False)[0])


def _refuse_unfit(model: MTAModel, form: str, names: Sequence[str]) -> None:
    """Checks that the model has a format for each task, before any is written.

    Raises:
        AlterError: with what is wrong with each that has not, and the names of those that have.
    """
    problems: list[str] = []
    fit: list[str] = []
    for name in names:
        try:
            if form == "adapter":
                joined_experts(model, name)
            else:
                with merged(model, name) if form == "hf" else _as_graph(model, name):
                    pass
            fit.append(name)
        except AlterError as error:
            problems += error.messages
    if problems and fit:
        problems.append(f"Nothing was written; of the others --format {form} does: --task {' --task '.join(fit)}.")
    if problems:
        raise AlterError(*dict.fromkeys(problems))


@contextlib.contextmanager
def _as_graph(model: MTAModel, task: str) -> Iterator[PreTrainedModel]:
    """The backbone as a graph is made of it: with merged weights, which is smaller, or where there are none with routers.

    Raises:
        AlterError: neither is possible.
    """
    with contextlib.ExitStack() as stack:
        try:
            backbone = stack.enter_context(merged(model, task))
        except AlterError:
            backbone = stack.enter_context(_routed(model, task))
        yield backbone


@contextlib.contextmanager
def _routed(model: MTAModel, task: str) -> Iterator[PreTrainedModel]:
    """The backbone with its adapters and routers, for one task.

    Raises:
        AlterError: a router depends on what a graph of the backbone does not see.
    """
    layer = next(iter(model.layers.values()))
    for router in (layer.router, layer.shared_router):
        if router is not None and (router.reads_prompt or router.reads_sequence):
            what = (
                "the prompt apart from the answer"
                if router.reads_prompt
                else "the first position, in all later steps too"
            )
            raise AlterError(
                f"{type(router).__name__} reads {what}, which one graph for prompts and answers does not; "
                + ("export stage 1's model (--stage stage1), or " if router is layer.shared_router else "")
                + "use the model as it is (--format alter, alter.load)."
            )
    task_id = model.tasks.index(task)
    model.set_examples({"task_ids": torch.tensor([task_id])})
    model.routing.only_task = task_id
    try:
        yield model.backbone
    finally:
        model.routing.only_task = None


def write_onnx(model: PreTrainedModel, out: Path) -> None:
    """Writes ONNX graphs by transformers' own exporter, every size dynamic.

    A causal model is one graph ``model.onnx`` from tokens and a key-value cache, empty at first, to logits and the longer
    cache. An encoder-decoder is two, ``encoder.onnx`` and ``decoder.onnx``; the latter has no cache.

    Raises:
        AlterError: onnxscript is not installed, or the model does something that ONNX has no word for.
    """
    try:
        import onnxscript  # noqa: F401
        from transformers.exporters.base import ExportedModel
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
        from transformers.exporters.utils import decompose_for_generation
    except ImportError as error:
        raise AlterError(
            f"--format onnx needs {error.name}, which is not installed; pip install 'alter-mta[onnx]'."
        ) from error
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # without padding in the sample, transformers would leave the mask out of the graph
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    try:
        with _quiet():
            exporter: Any = OnnxExporter()
            config = OnnxConfig(dynamic=True)
            if model.config.is_encoder_decoder:
                encoded = model.get_encoder()(**inputs)
                decoding = {
                    "decoder_input_ids": ids[:, :5],
                    "encoder_outputs": encoded,
                    "attention_mask": inputs["attention_mask"],
                    "use_cache": False,
                }
                parts: dict[str, Any] = {"encoder": (model.get_encoder(), inputs), "decoder": (model, decoding)}
                found = {name: exporter.export(*part, config).components["model"] for name, part in parts.items()}
            else:
                # From an empty cache the step that decodes reads prompts too, so the other one is not needed.
                step: Any = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
                found = {"model": exporter.export(*step, config).components["model"]}
            ExportedModel(found, exporter.export_format, config=model.config).save_pretrained(out)
    except Exception as error:  # the exporter raises whatever the tracing met
        raise AlterError(
            f"--format onnx: the exporter does not translate {type(model).__name__} ({in_short(error)}); take --format hf."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's steps and advice from the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of all loggers: some of the exporter's are named by their files
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _megabytes(files: Sequence[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
