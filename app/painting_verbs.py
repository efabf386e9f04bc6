"""`sample` and `edit`: what is done with a model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.verb import Output, verb

Json = Annotated[bool, typer.Option("--json", help="print one JSON object, no progress")]
Stage = Annotated[
    str | None,
    typer.Option("--stage", help="a stage of the newest recipe, as it is ready; default: its last"),
]
Model = Annotated[
    str | None, typer.Option("--model", help="a model folder or address instead of a stage")
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, max=1000, help="unmasking steps; default: the recipe's"),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", min=0, max=100, help="1 is off; default: the recipe's"),
]
Negative = Annotated[
    str | None,
    typer.Option(
        "--negative",
        metavar="PROMPT",
        help="what the image should not be; default: the model's own; an empty one is none",
    ),
]
Order = Annotated[
    str | None,
    typer.Option("--order", help="confidence, margin, entropy, random or halton: what stays"),
]
GuidanceSchedule = Annotated[
    str | None,
    typer.Option("--guidance-schedule", help="constant, linear or cosine: how it rises"),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        "--guidance-interval", metavar="FROM,TO", help="0.1,0.8: off in the other steps, and faster"
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0, help="noise on what stays, falling to 0; default: the recipe's"
    ),
]
TokenTemperature = Annotated[
    float | None,
    typer.Option("--token-temperature", min=0, help="of the draw; 0 takes the likeliest"),
]
Zigzag = Annotated[
    float | None, typer.Option("--zigzag", min=0, max=1, help="share of the steps taken twice")
]
Score = Annotated[
    float | None,
    typer.Option("--score", help="preference score asked for; default: the model's own"),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="FOLDER[:WEIGHT]", help="adapters on top, such as style:0.5; several add"
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1; auto is a GPU or the CPU"),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision", metavar="TYPE", help="fp32, bf16 or fp16; auto is bf16 where it is native"
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="TYPE", help="int8 or fp8 weights, a quarter of fp32's"),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="text encoder and tokenizer on the GPU only while they work"),
]
Tile = Annotated[
    int | None,
    typer.Option("--tile", min=1, metavar="PX", help="see pictures in tiles of this side"),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="slow to begin, then faster: for many images on a GPU")
]

SAMPLE_EXAMPLES = """\b
Examples
  atelier sample "a red circle on a blue background"
  atelier sample "two squares" "a star" --stage concepts --seed 7 --out pair.png
  atelier sample --prompts prompts.txt --seeds 0-3 --grid grid.png
  atelier sample "a star" --size 64x96 --steps-preview gif
  atelier sample "a red fox" --model /models/meissonic --steps 48 --guidance 9 --negative blurry
  atelier sample "a red fox" --model /models/meissonic --quantize int8 --offload --tile 512
      on a GPU of 8 GB and less"""

EDIT_EXAMPLES = """\b
Examples
  atelier edit fox.png "change the circle to blue"
      fox.png was painted here: it carries its caption
  atelier edit photo.jpg "remove the car" --caption "a red car on a road"
  atelier edit photo.jpg "a blue car on a road" --caption "a red car on a road"
      the wanted caption instead of an instruction
  atelier edit photo.jpg "a cat" --mask white-is-painted.png --feather 8
  atelier edit photo.jpg "a cat" --box 40,40,64,64
  atelier edit photo.jpg "a road" --outpaint left=64,right=64
  atelier edit photo.jpg "a road in winter" --operation global --strength 0.6

\b
Operations (EMU-Edit's seven), each with its own defaults
  add, remove, local, texture, background   in the place where the words differ, or the mask
  global, style                             everywhere, keeping some of what was there"""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(epilog=SAMPLE_EXAMPLES)(sample)
    app.command(epilog=EDIT_EXAMPLES)(edit)


@verb
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="one image each")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="a file with one prompt a line; - reads standard input"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write; numbered if several")] = (
        Path("sample.png")
    ),
    stage: Stage = None,
    model: Model = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the first image")] = 0,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="RANGE", help="0-3 or 1,5,9: every prompt with each"),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="PX", help="512 or 768x512, width first; default: its own"),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option("--grid", help="also write one PNG: a column per prompt, a row per seed"),
    ] = None,
    order: Order = None,
    guidance_schedule: GuidanceSchedule = None,
    guidance_interval: GuidanceInterval = None,
    temperature: Temperature = None,
    token_temperature: TokenTemperature = None,
    zigzag: Zigzag = None,
    score: Score = None,
    lora: Lora = None,
    steps_preview: Annotated[
        str | None,
        typer.Option("--steps-preview", metavar="gif|strip", help="also show the unmasking"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="images painted at a time")
    ] = 16,
    device: Device = "auto",
    precision: Precision = "auto",
    quantize: Quantize = None,
    offload: Offload = False,
    tile: Tile = None,
    compile_: Compile = False,
    json_: Json = False,
) -> None:
    """Paint prompts with a trained stage.

    Each PNG carries its lineage in its text chunks: the model, the words, and every value that it
    was painted with. The same seed gives the same image, whatever else is painted with it; without
    --seeds, image i has seed + i. Images are written after each batch; one that is there with the
    very same lineage is not painted again.
    """
    from app.easel import Brush, Machine
    from app.painting_options import adapters_of, interval_of, prompts_of, seeds_of, size_of
    from app.preview import KINDS
    from app.sample import Wish, paint
    from infra.errors import UserError

    output = Output(json_)
    if not prompts and prompts_file is None:
        raise typer.BadParameter("give at least one prompt, or a file of them with --prompts")
    if steps_preview is not None and steps_preview not in KINDS:
        raise UserError(expected="gif or strip after --steps-preview", got=repr(steps_preview))
    words = prompts_of(prompts or [], prompts_file)
    wish = Wish(
        prompts=tuple(words),
        seeds=tuple(seeds_of(seeds)) if seeds is not None else None,
        seed=seed,
        out=out,
        size_px=None if size is None else size_of(size),
        batch_size=batch_size,
        grid=grid,
        preview=steps_preview,
    )
    brush = Brush(
        stage, model, steps, guidance, guidance_schedule,
        None if guidance_interval is None else interval_of(guidance_interval),
        negative, temperature, token_temperature, order, zigzag, score, adapters_of(lora or []),
        Machine(device, precision, quantize, offload, tile, compile_),
    )  # fmt: skip
    images = paint(wish, brush, output)
    if there := sum(image.was_there for image in images):
        output.say(f"{there} of {len(images)} were there already, painted in the very same way")
    for image in images:
        output.say(f"{image.path}  {image.prompt}")
    output.result({"images": [image.to_json() for image in images]})


@verb
def edit(
    image: Annotated[Path, typer.Argument(help="the picture: PNG, JPEG, WebP, …")],
    words: Annotated[str, typer.Argument(help="an instruction, or the caption that is wanted")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write")] = Path("edited.png"),
    caption: Annotated[
        str | None,
        typer.Option("--caption", help="what the picture shows now; default: what it carries"),
    ] = None,
    operation: Annotated[
        str | None, typer.Option("--operation", metavar="NAME", help="default: as the words say")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="a picture of its size: paint where it is light")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="X,Y,W,H", help="paint in this box, in px")
    ] = None,
    outpaint: Annotated[
        list[str] | None,
        typer.Option("--outpaint", metavar="SIDE=PX", help="continue it: left, top, right, bottom"),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="above 0 to 1: how much may change")
    ] = None,
    feather: Annotated[
        int, typer.Option("--feather", min=0, max=512, help="px over which the paint fades in")
    ] = 0,
    stage: Stage = None,
    model: Model = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="the same seed, the same result")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    order: Order = None,
    guidance_schedule: GuidanceSchedule = None,
    guidance_interval: GuidanceInterval = None,
    temperature: Temperature = None,
    token_temperature: TokenTemperature = None,
    zigzag: Zigzag = None,
    score: Score = None,
    lora: Lora = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="also write NAME-before-after.png")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    quantize: Quantize = None,
    offload: Offload = False,
    tile: Tile = None,
    compile_: Compile = False,
    json_: Json = False,
) -> None:
    """Change a picture by words, in a mask, or beyond its borders.

    Every pixel outside the place that is painted stays as it was, to the bit, transparent ones and
    the ICC profile of RGB colours included. The PNG has 8 bits a channel: of 16 bits the upper 8
    are taken, grey and other colours become RGB, and other metadata is left behind. In a picture
    of more pixels than the model's own resolution a window around the place is painted. Without
    --mask and --box the place is found: where the caption now and the caption wanted predict
    different tokens. The PNG carries its lineage: the model, the words, every value that it was
    painted with, the parent's sha256.
    """
    from app.easel import Brush, Machine
    from app.edit import EditWish
    from app.edit import edit as paint_into
    from app.painting_options import adapters_of, box_of, interval_of, sides_of

    output = Output(json_)
    wish = EditWish(
        image,
        words,
        out,
        caption,
        operation,
        mask,
        None if box is None else box_of(box),
        sides_of(outpaint) if outpaint else None,
        strength,
        feather,
        seed,
        side_by_side,
    )
    brush = Brush(
        stage, model, steps, guidance, guidance_schedule,
        None if guidance_interval is None else interval_of(guidance_interval),
        negative, temperature, token_temperature, order, zigzag, score, adapters_of(lora or []),
        Machine(device, precision, quantize, offload, tile, compile_),
    )  # fmt: skip
    edited = paint_into(wish, brush, output)
    output.say(f"{edited.path}  {edited.operation}: {edited.prompt}")
    if edited.before_after is not None:
        output.say(edited.before_after)
    output.result(edited.to_json())
