"""Generation of a batch of mixed tasks against peft's ``adapter_names``: same backbone, blocks, rank and number of tokens.

Both models are as their library loads them to answer.

python benchmarks/mixed_generation.py
"""

import common
import torch
from peft import LoraConfig, get_peft_model

from alter.nn import LoRA, TaskSelector
from alter.nn.backbone import resolve_backbone
from alter.nn.decoding import generate

TASKS = 8


def adapted_by_peft(folder, layers, args):
    """The backbone with a LoRA a task by peft, in the same blocks as ours."""
    backbone = common.load_backbone(folder, args.precision)
    last = backbone.config.num_hidden_layers
    config = LoraConfig(
        r=args.rank,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        layers_to_transform=None if layers == "all" else list(range(last - int(layers.split(":")[1]), last)),
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(backbone, config, adapter_name="task0")
    for index in range(1, TASKS):
        found.add_adapter(f"task{index}", config)
    return found.to(common.DEVICE).eval()


def measure(args, layers):
    """A row for each size of batch."""
    folder = str(resolve_backbone(args.smollm2))  # peft knows folders alone
    ours = (
        common.model(folder, args.precision, TASKS, LoRA(rank=args.rank), TaskSelector(hard=True), layers)
        .eval()
        .settle()
    )
    theirs = adapted_by_peft(folder, layers, args)
    new = {"max_new_tokens": args.new, "min_new_tokens": args.new}
    rows = []
    for batch in args.batch:
        prompts = common.prompts(batch, args.length, TASKS)
        inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        names = [f"task{int(task)}" for task in prompts["task_ids"]]

        def peft(inputs=inputs, names=names):
            with torch.inference_mode():
                theirs.generate(**inputs, adapter_names=names, do_sample=False, **new)

        def alter(prompts=prompts):
            generate(ours, prompts, **new)

        seconds = common.alternate(args.rounds, ours=alter, peft=peft)
        called = common.called("SmolLM2-135M", layers, args.precision)
        name = f"{called}, batch of {batch}: mixed-task generation over peft's adapter_names"
        rows.append(common.row(name, common.ratios(seconds["peft"], seconds["ours"]), 1.2))
    return rows


def main():
    """Every choice of blocks."""
    parser = common.options(__doc__)
    # the recipes adapt 40% of 30 blocks; peft, unless told otherwise, all
    parser.add_argument("--layers", nargs="+", default=["last:4", "last:12", "all"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--new", type=int, default=24, help="tokens to make")
    args = parser.parse_args()
    common.save([row for layers in args.layers for row in measure(args, layers)], args.out)


if __name__ == "__main__":
    main()
