"""`atelier edit`: a picture and words to a new picture, with its parent and its words inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from app.easel import Brush, Easel, check_keywords, on_this_machine, set_up
from app.painting_options import MAX_SIDE_PX, printable
from app.sample import check_png
from app.sources import SOFTWARE
from app.verb import Output
from infra.digests import sha256_bytes, sha256_file
from infra.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from model.paint_options import PaintKeywords

ICC_COLOURS = slice(16, 20)  # of a profile's bytes: which kind of colours it is of


@dataclass(frozen=True)
class EditWish:
    """What was asked for. At most one of ``mask``, ``box`` and ``sides`` is given."""

    image: Path
    words: str  # an instruction, or the caption that the result should have
    out: Path
    caption: str | None = None  # of the image as it is; None is what an image of ours carries
    operation: str | None = None
    mask: Path | None = None
    box: tuple[int, int, int, int] | None = None  # x, y, width, height in px
    sides: dict[str, int] | None = None
    strength: float | None = None
    feather_px: int = 0
    seed: int = 0
    side_by_side: bool = False


@dataclass(frozen=True)
class Edited:
    """A written image. ``before_after`` is there when it was asked for."""

    path: str
    prompt: str
    operation: str
    lineage: dict[str, str]
    before_after: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def edit(wish: EditWish, brush: Brush, out: Output) -> Edited:
    """Paint into the image and write the result."""
    check_png(wish.out)
    given = [
        name
        for name, value in (("--mask", wish.mask), ("--box", wish.box), ("--outpaint", wish.sides))
        if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one")
    from model.pixels import layers_of, to_images, to_pixels

    image, carried, icc_profile = open_picture(wish.image)
    layers_of([image])  # what no painter reads is said before one is loaded
    mask = _mask_of(wish, image)
    prompt, caption, operation = read_words(wish, carried)

    from app.contact_sheet import save_png

    with on_this_machine():
        easel = set_up(brush, out)
        result, place = _painted(wish, easel, image, mask, prompt, caption, operation)
    lineage = {
        "prompt": prompt,
        "instruction": printable(wish.words),
        "operation": operation or ("outpaint" if wish.sides else "inpaint" if mask else "edit"),
        "seed": str(wish.seed),
        "feather_px": str(wish.feather_px),
        "parent": wish.image.name,
        "parent_sha256": sha256_file(wish.image),
        **({"parent_caption": caption} if caption else {}),
        **({"mask_sha256": sha256_bytes(place.tobytes())} if place is not None else {}),
        **({"outpaint": _listed(wish.sides)} if wish.sides else {}),
        **({} if wish.strength is None else {"strength": str(wish.strength)}),
        **easel.lineage,
    }
    save_png(result, wish.out, lineage, icc_profile)
    before_after = None
    if wish.side_by_side:
        before_after = wish.out.with_name(f"{wish.out.stem}-before-after.png")
        from app.preview import side_by_side

        before, after = (to_images(to_pixels([picture]))[0] for picture in (image, result))
        pictures = [before, *([] if place is None else [place.convert("RGB")]), after]
        save_png(side_by_side(pictures), before_after, lineage, icc_profile)
    shown = None if before_after is None else str(before_after)
    return Edited(str(wish.out), prompt, lineage["operation"], lineage, shown)


def _listed(sides: Mapping[str, int]) -> str:
    """As it is typed after --outpaint."""
    return ",".join(f"{side}={pixels}" for side, pixels in sides.items())


def _painted(
    wish: EditWish,
    easel: Easel,
    image: Image,
    mask: Image | None,
    prompt: str,
    caption: str | None,
    operation: str | None,
) -> tuple[Image, Image | None]:
    """The result, and the mask in which it was painted, if there is one."""
    from infra.progress import progress
    from model import OPERATIONS
    from model.sampler import first_step_of

    check_keywords({**easel.keywords, "seed": wish.seed}, 1)
    if wish.strength is not None:
        first_step_of(wish.strength, easel.keywords["steps"])
    painter, sources = easel.painter, None if caption is None else [caption]
    with progress("painting", int(easel.keywords["steps"]), "steps") as bar:
        keywords: PaintKeywords = {
            **easel.keywords,
            "seed": wish.seed,
            "progress": lambda done, total, tokens: bar.update(done, total),
        }
        if wish.sides is not None:
            (result,) = painter.outpaint(
                [prompt], [image], feather_px=wish.feather_px, **wish.sides, **keywords
            )
            return result, None
        everywhere = operation is not None and OPERATIONS[operation].everywhere
        if mask is None and not everywhere and (sources is not None or operation is not None):
            (mask,) = painter.find_change([prompt], [image], sources, operation, **keywords)
            if mask.getbbox() is None:
                raise UserError(
                    expected="something to paint",
                    got=f"{caption or ''!r} and {prompt!r}, of which this model predicts the same",
                    remedy="say the change in other words, or the place with --mask or --box",
                )
        (result,) = painter.edit(
            [prompt],
            [image],
            wish.strength,
            masks=None if mask is None else [mask],
            operation=operation,
            feather_px=wish.feather_px,
            **keywords,
        )
    return result, mask


def read_words(wish: EditWish, carried: str | None) -> tuple[str, str | None, str | None]:
    """(the caption wanted, the caption now or None, the operation or None)."""
    from model import is_instruction, operation_of, read_instruction

    operation = None if wish.operation is None else operation_of(wish.operation).name
    words = printable(wish.words)
    caption = wish.caption if wish.caption is not None else carried
    caption = None if caption is None else printable(caption)
    if wish.sides is None and is_instruction(words):
        if caption is None:
            raise UserError(
                expected="a caption of the picture as it is, with an instruction",
                got=f"{words[:80]!r} and no --caption",
                remedy="add --caption, or give the wanted caption instead of an instruction",
            )
        read = read_instruction(words, caption)
        return read.prompt, caption, operation or read.operation
    return words, caption, operation


class Opened(NamedTuple):
    """A picture upright; its caption if it is one of ours; a profile of RGB colours, if it has one.

    A profile of grey or of printing inks says nothing of the RGB that is written.
    """

    image: Image
    caption: str | None
    icc_profile: bytes | None


def open_picture(path: Path) -> Opened:
    """Read the first image of a file; one line where that is impossible."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if max(file.size) > MAX_SIDE_PX:
                raise UserError(
                    expected=f"a picture of at most {MAX_SIDE_PX} px a side",
                    got=f"{file.width} x {file.height} px at {path}",
                    remedy="make it smaller first",
                )
            file.load()
            text = getattr(file, "text", {})
            ours = text.get("software") == SOFTWARE  # other programs keep other things there
            caption = text.get("prompt") if ours else None
            profile = file.info.get("icc_profile")
            is_rgb = profile is not None and profile[ICC_COLOURS] == b"RGB "
            return Opened(ImageOps.exif_transpose(file), caption, profile if is_rgb else None)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        known = not isinstance(error, UnidentifiedImageError) and getattr(error, "strerror", None)
        reason = known or "it cannot be read as one"
        raise UserError(expected=f"a picture at {path}", got=reason) from None


def _mask_of(wish: EditWish, image: Image) -> Image | None:
    from PIL import Image as Images

    if wish.mask is not None:
        mask = open_picture(wish.mask).image
        if mask.size != image.size:
            raise UserError(
                expected=f"a mask of the picture's size, {image.width} x {image.height} px",
                got=f"{mask.width} x {mask.height} px at {wish.mask}",
                remedy="white is painted, black and transparent are kept",
            )
        from model.pixels import to_masks

        if not to_masks([mask], image.size).any():
            raise UserError(
                expected="a mask with something to paint",
                got=f"one without a light place at {wish.mask}",
                remedy="white is painted, black and transparent are kept",
            )
        return mask
    if wish.box is None:
        return None
    x, y, width, height = wish.box
    if x + width > image.width or y + height > image.height:
        raise UserError(
            expected=f"a box inside the picture of {image.width} x {image.height} px",
            got=f"one that ends at {x + width}, {y + height}",
        )
    mask = Images.new("L", image.size)
    mask.paste(255, (x, y, x + width, y + height))
    return mask
