"""The dataset card: a version in words, in the form that dataset hubs read.

Made from the manifest alone, so the same version always has the same card, to the byte. It is
therefore not listed in the manifest: it says nothing that the manifest does not prove.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from infra.manifest import DatasetManifest
from pipelines.image_config import blurred_faces_in_words
from pipelines.ledger import COMMITTED
from pipelines.publish import funnel_of
from pipelines.reasons import BEFORE_FETCH, words_for
from pipelines.recorded import matches_in_words

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
    (10_000_000_000, "1B<n<10B"),
    (100_000_000_000, "10B<n<100B"),
    (1_000_000_000_000, "100B<n<1T"),
)
_ON_UNKNOWN = {
    "keep": "rows without one were kept",
    "drop": "rows without one were dropped",
    "later": "rows without one went on, to be scored later",
}
_PERSONAL = {
    "redact": "E-mail addresses, phone, card and identity numbers, keys and passwords were cut "
    "from captions where patterns find them.",
    "drop": "Rows whose captions hold e-mail addresses, phone, card or identity numbers, keys or "
    "passwords were dropped where patterns find them.",
    "off": "Captions were not searched for personal data.",
}
_OPT_OUTS = {
    "robots_txt": "robots.txt (RFC 9309)",
    "x_robots_tag": "X-Robots-Tag (noai, noimageai and their like)",
    "tdm_reservation": "TDM reservations (headers and tdmrep.json)",
}


def card(manifest: DatasetManifest) -> str:
    """Markdown with YAML front matter; the same bytes for the same version, wherever it lies."""
    recipe = manifest.attributes.get("recipe", {})
    sections = {
        "Where it comes from": _origin(manifest),
        "Licence": _licence(),
        "How rows were chosen": _chosen(manifest, recipe),
        "Where the rows went": _funnel(manifest),
        "Images": _images(manifest, recipe),
        "Captions": _captions(manifest, recipe),
        "Known gaps": _gaps(manifest, recipe),
        "Personal data and opt-outs": _personal(recipe),
        "To have something removed": _removal(manifest),
        "Reading it": _reading(manifest),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text.strip())
    about = (
        f"{manifest.counts[COMMITTED]:,} images with captions in {len(manifest.shards):,} "
        f"WebDataset shards, {sum(s.num_bytes for s in manifest.shards) / 1e6:,.1f} MB. "
        f"Version `{manifest.version}`."
    )
    return f"{_front_matter(manifest, recipe)}\n# {_plain(manifest.name)}\n\n{about}\n\n{body}"


def _front_matter(manifest: DatasetManifest, recipe: Mapping[str, Any]) -> str:
    """The fields that hubs know; texts as JSON strings, which are YAML too."""
    number = manifest.counts[COMMITTED]
    size = next((name for bound, name in _SIZES if number < bound), "n>1T")
    known: dict[str, Any] = {
        "pretty_name": manifest.name,
        "license": "other",
        "license_name": "links-to-third-party-images",
        "task_categories": ["text-to-image"],
        "size_categories": [size],
        "tags": ["image", "text", "webdataset"],
    }
    languages = recipe.get("filters", {}).get("languages")
    if languages:
        known["language"] = sorted({str(code).lower() for code in languages})
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in known.items()]
    return "\n".join(["---", *lines, "---", ""])


def _origin(manifest: DatasetManifest) -> str:
    lines = [f"Source: {_plain(str(manifest.attributes.get('source', 'unknown')))}.", ""]
    for parent in manifest.parents:
        if not isinstance(parent, dict):
            continue
        if "version" in parent:
            name = _plain(str(parent.get("dataset", "")))
            lines.append(f"- dataset {name}, version `{parent['version']}`")
        elif "sha256" in parent:
            lines.append(
                f"- {parent.get('kind', 'file')} file, {parent.get('num_rows', 0):,} rows, "
                f"sha256 `{parent['sha256']}`"
            )
        else:
            told = ", ".join(f"{name} `{value}`" for name, value in sorted(parent.items()))
            lines.append(f"- {told}")
    for step in manifest.attributes.get("derivations", []):
        lines.append(f"- then {_plain(str(step.get('kind')))}: `{_json(step)}`")
    return "\n".join(lines)


def _licence() -> str:
    return (
        "Images belong to whoever made them; this dataset gives no right to them. Each sample "
        "names the address it came from. What may be done with an image depends on its own licence "
        "and on the law where it is used. The metadata have the licence of their source."
    )


def filters_in_words(recipe: Mapping[str, Any]) -> Iterator[str]:
    """A line for each filter that is on."""
    filters = recipe.get("filters", {})
    unknown = filters.get("unknown", {})

    def on_unknown(name: str) -> str:
        return _ON_UNKNOWN.get(unknown.get(name), "")

    sides = [
        f"{what} of at least {filters[name]:,} px"
        for name, what in (("min_width_px", "width"), ("min_height_px", "height"))
        if filters.get(name) is not None
    ]
    if sides:
        yield f"{' and '.join(sides)}; {on_unknown('size')}"
    if filters.get("max_aspect_ratio") is not None:
        yield f"longer side at most {filters['max_aspect_ratio']:g} times the shorter one"
    scale = filters.get("aesthetic_scale", "v2")
    for name, value, text in (
        ("min_aesthetic_score", "aesthetic_score", f"aesthetic score ({scale}) of at least"),
        ("max_watermark_prob", "watermark_prob", "probability of a watermark of at most"),
        ("max_unsafe_prob", "unsafe_prob", "probability of being unsafe of at most"),
        ("min_clip_similarity", "clip_similarity", "CLIP similarity of image and caption from"),
    ):
        if filters.get(name) is not None:
            yield f"{text} {filters[name]:g}; {on_unknown(value)}"
    if filters.get("languages"):
        codes = ", ".join(_plain(str(code)) for code in filters["languages"])
        yield f"language one of {codes}; {on_unknown('language')}"
    if filters.get("max_caption_chars") is not None:
        yield f"alt text of at most {filters['max_caption_chars']:,} characters"
    if filters.get("min_caption_words") is not None:
        yield f"a caption of at least {filters['min_caption_words']} words"
    yield from _copies(recipe.get("duplicates", {}))


def _copies(duplicates: Mapping[str, Any]) -> Iterator[str]:
    same = [
        what
        for name, what in (("same_url", "address"), ("same_bytes", "bytes"))
        if duplicates.get(name)
    ]
    if same:
        yield f"of images with the same {' or '.join(same)} one, the best scored"
    near = duplicates.get("perceptual")
    if near is not None:
        yield f"of images that look the same (cosine from {near['min_similarity']:g}) one"


def _chosen(manifest: DatasetManifest, recipe: Mapping[str, Any]) -> str:
    lines = [f"- {line}" for line in filters_in_words(recipe)] if recipe else []
    if recipe.get("image_checks"):
        lines.append(f"- by measures of the pixels: `{_json(recipe['image_checks'])}`")
    if "decontaminated" in manifest.attributes:
        lines.append(
            "- no row whose caption repeats a prompt of the evaluation sets: "
            f"`{_json(manifest.attributes['decontaminated'])}`"
        )
    if "search" in manifest.attributes:
        lines.append(f"- the hits of a search: `{_json(manifest.attributes['search'])}`")
    return "\n".join(lines)


def _funnel(manifest: DatasetManifest) -> str:
    total = max(manifest.counts["rows_in"], 1)
    lines = ["| outcome | rows | share | meaning |", "|---|---:|---:|---|"]
    lines += [
        f"| {name} | {number:,} | {100 * number / total:.2f} % | {words_for(name)} |"
        for name, number in funnel_of(manifest).items()
    ]
    return "\n".join(lines)


def _images(manifest: DatasetManifest, recipe: Mapping[str, Any]) -> str:
    known = manifest.attributes
    if "image_size_px" not in known:
        return ""
    crop = {
        "square": "cut to a centred square",
        "none": "whole",
        "bucket": "cut to the nearest of a few aspect ratios, one per shard",
    }[known.get("crop", "square")]
    quality = recipe.get("resize", {}).get("encode_quality")
    told = "" if quality is None else f", quality {quality}"
    return (
        f"{known.get('encode_format', 'jpg')}{told}, sRGB, upright, {crop}, at "
        f"{known['image_size_px']} px, never enlarged. No metadata of the original is kept. The "
        "size before any change is in every sample."
    )


def _captions(manifest: DatasetManifest, recipe: Mapping[str, Any]) -> str:
    captions = recipe.get("captions", {})
    if not captions:
        return ""
    lines = [f"`.txt` holds the caption to train on: {captions.get('train_on')} text first."]
    if captions.get("token_budget") is not None:
        lines.append(f"It has at most {captions['token_budget']} tokens.")
    done = manifest.attributes.get("captions", {})
    if done:
        told = ", ".join(f"{_plain(name)} {number:,}" for name, number in sorted(done.items()))
        lines.append(f"What was done to captions, in rows: {told}.")
    return " ".join(lines)


def _gaps(manifest: DatasetManifest, recipe: Mapping[str, Any]) -> str:
    lines = []
    before = sum(number for name, number in manifest.rejected.items() if name in BEFORE_FETCH)
    asked = manifest.counts["rows_in"] - before
    failed = manifest.counts["failed"]
    if failed and asked:
        lines.append(
            f"- {failed:,} of {asked:,} links ({100 * failed / asked:.1f} %) did not answer with "
            "an image; what is gone is not a random part of the web"
        )
    for policy, values in sorted(manifest.attributes.get("unknown", {}).items()):
        for name, number in sorted(values.items()):
            lines.append(f"- {number:,} rows went on without {name.replace('_', ' ')} ({policy})")
    compared = matches_in_words(manifest.attributes)
    lines += [f"- {line}" for line in compared]
    if not compared:
        lines.append(
            "- no image was held against a digest that was recorded with its address: what the "
            "address serves may have changed since"
        )
    if not recipe.get("filters", {}).get("languages"):
        lines.append("- captions are in whatever language their pages were")
    if recipe.get("duplicates", {}).get("perceptual") is None:
        lines.append("- copies that differ in a byte were not looked for")
    lines.append("- scores are models' guesses and carry these models' preferences")
    if recipe.get("blur_faces") is None:
        lines.append("- people are in the images, and their faces were not blurred")
    else:
        lines.append(f"- {blurred_faces_in_words()}")
    return "\n".join(lines)


def _personal(recipe: Mapping[str, Any]) -> str:
    captions = _PERSONAL.get(recipe.get("captions", {}).get("personal_data", ""), "")
    asked = recipe.get("fetch", {}).get("opt_outs", {})
    honoured = [words for name, words in _OPT_OUTS.items() if asked.get(name)]
    ignored = [words for name, words in _OPT_OUTS.items() if asked and not asked.get(name)]
    lines = [captions] if captions else []
    if honoured:
        lines.append(f"Opt-outs were honoured before a body was read: {'; '.join(honoured)}.")
    if ignored:
        lines.append(f"Not asked for: {'; '.join(ignored)}.")
    return " ".join(lines)


def _removal(manifest: DatasetManifest) -> str:
    name = _plain(manifest.name)
    removed = manifest.rejected.get("takedown", 0)
    told = f" {removed:,} rows were removed so far." if removed else ""
    return (
        "Write to whoever gave you this dataset, with the image's address, its host, or the sample "
        f"id. They run `atelier takedown --dataset {name} --url …` (or `--domain`, `--sha256`, "
        "`--sample`): the image leaves every version and the store, and no later curation brings "
        f"it back.{told}"
    )


def _reading(manifest: DatasetManifest) -> str:
    first = manifest.shards[0].path if manifest.shards else "shards/"
    return (
        "Shards are plain tars that `tar` and `webdataset` read: an image, `.txt` and `.json` per "
        f"sample, `{first}` and {max(len(manifest.shards) - 1, 0):,} more, listed with their "
        "sha256 in `manifest.json`. How every row ended is in `ledger/`."
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).replace("`", "'")


def _plain(text: str) -> str:
    """Text that is neither markup nor a table's edge."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
