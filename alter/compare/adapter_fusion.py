"""AdapterFusion (arXiv 2005.00247) by the adapters library: ``python -I adapter_fusion.py FOLDER``.

Runs in an environment of its own, where ALTER is not: the library needs an older transformers. ``FOLDER`` is what
`alter.compare.handover` has written; all batches are lists of token ids, made and packed there. Each task's adapter is
trained alone, then the fusion of all on the mixture, then the split is answered and ``result.json`` written. What has been
trained stays in ``FOLDER/../model``, a file a training, and is not trained again.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters.composition import Fuse
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, get_scheduler
from transformers.modeling_outputs import BaseModelOutput

IGNORED = -100
DIVERGED = 3  # the exit status where the loss is no number any more, as in alter.compare.handover
MAX_SCORED_POSITIONS = 4096  # rows x (prompt + choice) of one pass, as in alter.nn.choices
# All that is kept of how the backbone was meant to decode, as in alter.nn.backbone
SPECIAL_TOKENS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")

Plan = dict[str, Any]
Model = Any  # a PreTrainedModel, to which the library has added methods
Batch = dict[str, list[list[int]]]


def load_model(plan: Plan) -> Model:
    """The frozen backbone with an adapter a task and their fusion, in the blocks that the plan names."""
    torch.manual_seed(plan["seed"])
    kind = AutoModelForSeq2SeqLM if plan["seq2seq"] else AutoModelForCausalLM
    dtype = torch.bfloat16 if plan["bf16"] else torch.float32
    model: Model = kind.from_pretrained(plan["backbone"], dtype=dtype, local_files_only=True, use_safetensors=True)
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in SPECIAL_TOKENS}
    )
    model.requires_grad_(False)
    backbone = {id(parameter) for parameter in model.parameters()}
    names = {id(module): name for name, module in model.named_modules()}
    adapters.init(model)
    _pass_cache(model)
    left_out = [i for i, block in model.iter_layers() if names[id(block)] not in plan["blocks"]]
    # The library divides and rounds down; the half keeps the quotient clear of the next integer.
    factor = model.config.hidden_size / (plan["bottleneck"] + 0.5)
    for name in adapter_names(plan):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=factor, leave_out=left_out))
    fusion = Fuse(*adapter_names(plan))
    model.add_adapter_fusion(fusion)
    for module in model.modules():  # the library puts a fusion into every block, also where there is nothing to fuse
        if getattr(module, "adapter_fusion_layer", None) and not module.adapters:
            module.delete_fusion_layer(fusion.name)
    for parameter in model.parameters():
        if id(parameter) not in backbone:
            parameter.data = parameter.data.float()
    return model.to("cuda" if plan["cuda"] and torch.cuda.is_available() else "cpu")


def _pass_cache(model: Model) -> None:
    """Mends adapters 1.3: some of its layers, Llama's among them, take the key-value cache by a name of older transformers.

    Under 4.57 they would run without it, each generated token seeing itself alone.
    """

    def rename(module: Model, args: Any, kwargs: dict[str, Any]) -> Any:
        if "past_key_values" in kwargs:
            kwargs["past_key_value"] = kwargs.pop("past_key_values")
        return args, kwargs

    for module in model.modules():
        known = inspect.signature(type(module).forward).parameters
        if "past_key_value" in known and "past_key_values" not in known:
            module.register_forward_pre_hook(rename, with_kwargs=True)


def adapter_names(plan: Plan) -> list[str]:
    """The adapters' names, in the order of the tasks; a task's own could hold what the library splits names at."""
    return [f"task{i}" for i in range(len(plan["tasks"]))]


def trainable(model: Model) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- training -----------------------------------------------------------------------------------------------------------


def train_all(model: Model, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Trains each task's adapter on its own batches, then the fusion on the mixture with the adapters frozen."""
    names = adapter_names(plan)
    validation = [_read(folder / f"validation{i}.jsonl") for i in range(len(names))]
    weights = folder.parent / "model"
    weights.mkdir(exist_ok=True)
    records = []
    for i, name in enumerate(names):
        print(f"adapter of {plan['tasks'][i]['name']}", flush=True)
        model.train_adapter(name)
        batches = _read(folder / f"{name}.jsonl")
        records.append(_train_once(model, plan, weights / f"{name}.pt", batches, validation[i : i + 1]))
    print("fusion", flush=True)
    model.train_adapter_fusion(Fuse(*names))
    slower = {**plan, "optimizer_args": plan["fusion_optimizer_args"]}
    records.append(_train_once(model, slower, weights / "fusion.pt", _read(folder / "fusion.jsonl"), validation))
    return records


def _train_once(
    model: Model, plan: Plan, file: Path, batches: Sequence[Batch], validation: Sequence[Sequence[Batch]]
) -> dict[str, Any]:
    """Trains what is set to train, or takes it from the file where it was trained before."""
    model.eval()  # no dropout, as with every other method; choosing what trains has switched it on
    if file.is_file():
        found = torch.load(file, map_location="cpu", weights_only=True)
    else:
        record = train(model, plan, batches, validation)
        found = {"state": {name: p.detach().cpu() for name, p in trainable(model).items()}, "record": record}
        temporary = file.with_suffix(".new")
        torch.save(found, temporary)
        temporary.replace(file)
    _set(model, found["state"])
    return found["record"]


def train(model: Model, plan: Plan, batches: Sequence[Batch], validation: Sequence[Sequence[Batch]]) -> dict[str, Any]:
    """Trains what is set to train, and ends with the weights of the lowest validation loss.

    Args:
        model: with its trainable parameters chosen.
        plan: the optimizer and its schedule.
        batches: as many a step as the plan says; the last step may have fewer.
        validation: batches of each task that counts.

    Returns:
        what was measured.
    """
    parameters = trainable(model)
    optimizer = getattr(torch.optim, plan["optimizer"])(list(parameters.values()), **plan["optimizer_args"])
    together = plan["accumulate_grad_batches"]
    steps = math.ceil(len(batches) / together)
    schedule = plan["schedule"].replace("constant", "constant_with_warmup")  # transformers' plain one has no warm-up
    scheduler = get_scheduler(schedule, optimizer, round(plan["warmup"] * steps), steps)
    checks = {round(len(batches) * (i + 1) / plan["validations"]) for i in range(plan["validations"])}
    tokens, seconds, best, state = 0, 0.0, float("inf"), {}
    for number, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        losses, rows, read = token_losses(model, plan, batch)
        loss = losses.mean() if plan["loss_average"] == "token" else _by_example(losses, rows, len(batch["prompts"]))
        if not torch.isfinite(loss):
            print(
                f"The loss is {loss.item()} at batch {number} of {len(batches)}; lower the learning rate.", flush=True
            )
            raise SystemExit(DIVERGED)
        penalty = model.get_fusion_regularization_loss()  # part of the method, on the fusion's value matrices
        ((loss if penalty is None else loss + penalty) / together).backward()
        if number % together == 0 or number == len(batches):
            if plan["clip"]:
                nn.utils.clip_grad_norm_(parameters.values(), plan["clip"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        tokens += read
        seconds += time.perf_counter() - started
        if number in checks and (found := _validation_loss(model, plan, validation)) < best:
            best, state = found, {name: parameter.detach().clone() for name, parameter in parameters.items()}
            print(f"batch {number} of {len(batches)}: validation loss {best:.4f}", flush=True)
    _set(model, state)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "validation_loss": best if state else None,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _set(model: Model, state: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].data.copy_(value)


def _by_example(losses: Tensor, rows: Tensor, count: int) -> Tensor:
    sums = losses.new_zeros(count).index_add(0, rows, losses)
    return (sums / rows.bincount(minlength=count).clamp_min(1)).mean()


@torch.no_grad()
def _validation_loss(model: Model, plan: Plan, validation: Sequence[Sequence[Batch]]) -> float:
    """The mean over tasks of the loss a target token."""
    means = []
    for batches in validation:
        losses = torch.cat([token_losses(model, plan, batch)[0] for batch in batches])
        means.append(losses.double().mean().item())
    return sum(means) / len(means)


def token_losses(model: Model, plan: Plan, batch: Batch) -> tuple[Tensor, Tensor, int]:
    """Cross-entropy of every target token of a batch, the row of each, and how many tokens were read."""
    prompts, targets = batch["prompts"], batch["targets"]
    if plan["seq2seq"]:
        inputs = _inputs(model, plan, prompts)
        labels = _pad(targets, IGNORED).to(model.device)
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        inputs = _inputs(model, plan, [p + t for p, t in zip(prompts, targets, strict=True)])
        labels = _pad([[IGNORED] * len(p) + t for p, t in zip(prompts, targets, strict=True)], IGNORED)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(model.device)  # position i predicts token i + 1
    with _precision(model, plan):
        logits = model(**inputs, use_cache=False).logits
    kept = labels != IGNORED
    losses = F.cross_entropy(logits[kept].float(), labels[kept], reduction="none")
    return losses, kept.nonzero()[:, 0], sum(map(len, prompts)) + sum(map(len, targets))


def _precision(model: Model, plan: Plan) -> torch.autocast:
    """In bf16, autocast lets the fp32 adapters meet the backbone's bf16 states."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=plan["bf16"])


def _inputs(model: Model, plan: Plan, rows: Sequence[list[int]], left: bool = False) -> dict[str, Tensor]:
    mask = _pad([[1] * len(row) for row in rows], 0, left)
    return {
        "input_ids": _pad(rows, plan["pad"], left).to(model.device),
        "attention_mask": mask.to(model.device),
    }


def _pad(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(filled, rows, strict=True)])


# -- answers ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_all(model: Model, plan: Plan, folder: Path) -> list[list[Any]]:
    """The answers to each task's rows, in their order: the number of a choice, or the tokens of a text."""
    answers = []
    with _precision(model, plan):
        for i, task in enumerate(plan["tasks"]):
            print(f"answers of {task['name']}", flush=True)
            found: dict[int, Any] = {}
            for batch in _read(folder / f"questions{i}.jsonl"):
                if task["choices"]:
                    said = log_likelihoods(model, plan, batch["prompts"], task["choices"]).argmax(1).tolist()
                else:
                    said = generate(model, plan, batch["prompts"], task["max_new_tokens"])
                found |= zip(batch["rows"], said, strict=True)
            answers.append([found[row] for row in range(len(found))])
    return answers


def generate(model: Model, plan: Plan, prompts: Sequence[list[int]], longest: int) -> list[list[int]]:
    """Decodes greedily, until the end of the sequence or a stop token."""
    config = model.generation_config
    end = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    ends = {*(end if isinstance(end, list) else [end]), *plan["stop_tokens"]} - {None}
    inputs = _inputs(model, plan, prompts, left=not plan["seq2seq"])
    output = model.generate(
        **inputs,
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        pad_token_id=plan["pad"],
        eos_token_id=sorted(ends),
    )
    start = 1 if plan["seq2seq"] else inputs["input_ids"].shape[1]
    return [_until(row, ends) for row in output[:, start:].tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def log_likelihoods(model: Model, plan: Plan, prompts: Sequence[list[int]], choices: Sequence[list[int]]) -> Tensor:
    """Summed log-probability of every choice's tokens after every prompt, [batch, choices]; prompts are read once."""
    tokens = _pad(choices, IGNORED).to(model.device)
    per_prompt = len(choices) * (max(map(len, prompts)) + tokens.shape[1])
    size = max(1, MAX_SCORED_POSITIONS // per_prompt)
    score = _score_seq2seq if plan["seq2seq"] else _score_causal
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return torch.cat([score(model, _inputs(model, plan, part, left=not plan["seq2seq"]), tokens) for part in parts])


def _score_causal(model: Model, inputs: dict[str, Tensor], choices: Tensor) -> Tensor:
    mask = inputs["attention_mask"]
    batch, (count, length) = len(mask), choices.shape
    prompt = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
    scores = prompt.logits[:, -1].float().log_softmax(-1)[:, choices[:, 0]]
    if length == 1:
        return scores
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(count)
    read, wanted = choices[:, :-1].repeat(batch, 1), choices[:, 1:].repeat(batch, 1)
    mask = mask.repeat_interleave(count, 0)
    rest = model(
        input_ids=read.clamp_min(0),
        attention_mask=torch.cat([mask, (read != IGNORED).to(mask.dtype)], dim=1),
        position_ids=mask.sum(1, keepdim=True) + torch.arange(length - 1, device=mask.device),
        past_key_values=cache,
        use_cache=True,
    )
    return scores + _sum_by_row(rest.logits, wanted).view(batch, count)


def _score_seq2seq(model: Model, inputs: dict[str, Tensor], choices: Tensor) -> Tensor:
    mask = inputs["attention_mask"]
    batch, count = len(mask), len(choices)
    encoded = model.get_encoder()(**inputs).last_hidden_state.repeat_interleave(count, 0)
    wanted = choices.repeat(batch, 1)
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=mask.repeat_interleave(count, 0),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=wanted),
        use_cache=False,
    )
    return _sum_by_row(output.logits, wanted).view(batch, count)


def _sum_by_row(logits: Tensor, wanted: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return -losses.sum(1)


# -- the whole ----------------------------------------------------------------------------------------------------------


def peak_memory_bytes() -> int:
    """The most memory that this process ever held; the kernel's mark, since getrusage starts from the parent's."""
    status = Path("/proc/self/status")
    mark = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE) if status.is_file() else None
    return int(mark[1]) * 1024 if mark else 0


def _read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def main(folder: Path) -> None:
    """Trains and answers, and writes ``result.json``."""
    plan = json.loads((folder / "plan.json").read_text())
    model = load_model(plan)
    records = train_all(model, plan, folder)
    result = {
        "answers": answer_all(model, plan, folder),
        "routing": {},
        "trainable_parameters": sum(record["parameters"] for record in records),
        "tokens": sum(record["tokens"] for record in records),
        "step_seconds": sum(record["seconds"] for record in records),
        "peak_memory_bytes": max([peak_memory_bytes(), *(record["peak_memory_bytes"] for record in records)]),
        "validation_loss": records[-1]["validation_loss"],
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
