"""What `takedown` does: a request checked, carried out in every dataset, the models named."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.place import Place, place_of
from app.scoring import LazySpark
from app.takedown_told import carried_out, foreseen, stays_out
from app.upkeep import chosen_datasets
from app.verb import Output
from infra import storage
from infra.cluster import ClusterConfig
from infra.errors import UserError

if TYPE_CHECKING:
    from pipelines.neighbourhood import Neighbour
    from pipelines.tombstones import Tombstones

_SHOWN = 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAMPLE = re.compile(r"[0-9a-f]{32}")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@dataclass(frozen=True)
class Request:
    """What is to go; checked: a slip here would remove nothing, or too much."""

    urls: tuple[str, ...]
    domains: tuple[str, ...]
    images: tuple[str, ...]
    samples: tuple[str, ...]
    like: tuple[str, ...] = ()
    min_similarity: float = 0.95
    listed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        urls: Iterable[str],
        domains: Iterable[str],
        images: Iterable[str],
        samples: Iterable[str],
        file: Path | None,
        like: Iterable[str] = (),
        min_similarity: float = 0.95,
    ) -> Request:
        """From the options and the file's lines; ``UserError`` names the first that is odd."""
        listed: dict[str, list[str]] = {}
        if file is not None:
            from pipelines.tombstones import parse_list

            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} cannot be read: {error}") from error
            listed = parse_list(text, str(file))
        request = cls(
            tuple(urls),
            tuple(domain.strip().strip(".").lower() for domain in domains),
            tuple(image.lower() for image in images),
            tuple(sample.lower() for sample in samples),
            tuple(like),
            min_similarity,
            {kind: tuple(values) for kind, values in listed.items() if values},
        )
        request._check()
        return request

    def _check(self) -> None:
        for values, is_right, expected in (
            (self.urls, lambda v: "://" in v, "an address like https://a.example/1.jpg"),
            (self.domains, _HOST.fullmatch, "a host like a.example, without scheme or path"),
            (self.images, _SHA256.fullmatch, "a sha256 of 64 hex digits"),
            (self.samples, _SAMPLE.fullmatch, "a sample id of 32 hex digits"),
        ):
            for value in values:
                if not is_right(value):
                    raise UserError(expected=expected, got=repr(value))
        for like in self.like:
            if not _SAMPLE.fullmatch(like.lower()) and not Path(like).is_file():
                raise UserError(expected="a sample id of 32 hex digits or an image file", got=like)
        named = (self.urls, self.domains, self.images, self.samples, self.like, self.listed)
        if not any(named):
            raise UserError(
                "name what is to go: --url, --domain, --sha256, --sample, --like or --file; "
                "`atelier takedown --help` has examples"
            )

    @property
    def tombstones(self) -> Tombstones:
        """The same as digests."""
        from pipelines.tombstones import Tombstones, named_by

        plain = Tombstones.of(self.urls, self.domains, self.images, self.samples)
        return plain | named_by(self.listed)


def take_down_everywhere(
    request: Request,
    names: Collection[str],
    store: str | None,
    out: Output,
    *,
    dry_run: bool,
    keep_copies: bool = False,
) -> dict[str, Any]:
    """Carry it out, or with ``dry_run`` count, in these datasets or all; returns the JSON."""
    from infra.progress import progress
    from pipelines.takedown import Takedown, look_for, take_down
    from pipelines.tombstones import Tombstones

    place = place_of(store, out.say)
    store_uri = place.store_uri
    out.say(f"store {store_uri}" + (", this machine's own" if place.is_local else ""))
    with ExitStack() as stack:
        spark = LazySpark(ClusterConfig(), place, stack)
        chosen = chosen_datasets(store_uri, names)
        roots = {name: storage.join(store_uri, "datasets", name) for name in chosen}
        near: dict[str, list[Neighbour]] = {name: [] for name in roots}
        if request.like:
            likeness = _Likeness(request, store_uri, roots.values(), spark, place.environment)
            near = {name: likeness.near(root, out) for name, root in roots.items()}
        samples_near = [each.sample_id for found in near.values() for each in found]
        takedown = Takedown(
            tuple(roots.values()),
            request.tombstones | Tombstones.of(samples=samples_near),
            None if names else store_uri,
            not keep_copies,
        )
        told: dict[str, Any] = {}
        if dry_run:
            looked = look_for(takedown, spark, progress, place.environment)
            done = [foreseen(name, looked[root], near[name], out) for name, root in roots.items()]
        else:
            results, kept_out = take_down(takedown, spark, progress, place.environment)
            done = [carried_out(made, out, keep_copies=keep_copies) for made in results]
            told["stays_out"] = stays_out(takedown, kept_out, out)
    withdrawn = [version for each in done for version in each["versions"]]
    models = _models_of(withdrawn, place, out, dry_run=dry_run)
    for model in models or ():
        out.say(f"trained on it: {model['model']} version {model['version']} ({model['stage']})")
    return {"datasets": done, "models": models, "dry_run": dry_run, **told}


class _Likeness:
    """What ``--like`` names, as embeddings by every model that some dataset has been seen with."""

    def __init__(
        self, request: Request, store_uri: str, roots: Iterable[str], spark: LazySpark,
        environment: Mapping[str, str],
    ) -> None:  # fmt: skip
        from pipelines.clip_model import encoder_of, weights_uri
        from pipelines.neighbourhood import Neighbourhood
        from pipelines.search import image_query

        self._spark, self._least = spark, request.min_similarity
        self._around: dict[str, Neighbourhood] = {}
        for root in roots:
            with suppress(UserError):  # it has no embeddings
                self._around[root] = Neighbourhood.of(root, environment)
        ids = {each.lower() for each in request.like if _SAMPLE.fullmatch(each.lower())}
        paths = [Path(each) for each in request.like if not _SAMPLE.fullmatch(each.lower())]
        self._queries: dict[str, list[Any]] = defaultdict(list)
        missing = set(ids)
        for around in self._around.values():
            found = around.vectors(spark(), sorted(ids)) if ids else {}
            missing -= set(found)
            self._queries[around.embeddings.identity.key] += found.values()
        if missing:
            raise UserError(
                expected="after --like a sample with an embedding in one of the datasets",
                got=min(missing),
                remedy="run `atelier score RECIPE` for its dataset, or name an image file",
            )
        identities = [each.embeddings.identity for each in self._around.values()]
        for identity in {each.key: each for each in identities}.values():
            encoder = encoder_of(identity, weights_uri(store_uri, identity.weights_sha256))
            self._queries[identity.key] += [image_query(encoder, path) for path in paths]

    def near(self, root: str, out: Output) -> list[Neighbour]:
        """The samples of a dataset near what was named, told; none where it has no embeddings."""
        import numpy as np

        name = root.rpartition("/")[2]
        around = self._around.get(root)
        queries = self._queries[around.embeddings.identity.key] if around is not None else []
        if around is None or not queries:
            out.say(f"{name}: no embeddings, so nothing is looked for by likeness")
            return []
        found = around.near(self._spark(), np.stack(queries), self._least)
        out.say(f"{name}: {len(found):,} samples at a cosine of {self._least:g} or nearer")
        few = len(found) <= _SHOWN
        for each in found if few else [*found[: _SHOWN // 2], *found[-_SHOWN // 2 :]]:
            out.say(f"  {each.cosine:7.4f}  {each.sample_id}  {each.url}")
        return found


def _models_of(
    versions: Collection[str], place: Place, out: Output, *, dry_run: bool
) -> list[dict[str, Any]] | None:
    """The registered models that were trained on one of these dataset versions.

    None, and told, where nobody says which MLflow server knows them. Raises ``UserError`` when it
    does not answer: what was taken down is gone, and who was trained on it must not go unasked.
    """
    from training.versions import TAG_DATASET, TAG_STAGE, trained_on

    if not versions:
        return []
    named = ", ".join(sorted(versions))
    if place.tracking_uri is None:
        out.say(
            f"which models were trained on it is not known: no run here stored in "
            f"{place.store_uri}, and MLFLOW_TRACKING_URI is not set; ask its MLflow server for "
            f"models with the tag {TAG_DATASET}, one of {named}"
        )
        return None
    try:
        trained = [(each, version) for version in sorted(versions)
                   for each in trained_on(place.server, version)]  # fmt: skip
    except UserError as error:
        done = "nothing was changed" if dry_run else "the takedown is carried out"
        raise UserError(
            f"{done}, but which models were trained on dataset versions "
            f"{named} is not known: {error}"
        ) from error
    return [
        {
            "model": found.name,
            "version": found.version,
            "stage": found.tags.get(TAG_STAGE, ""),
            "dataset_version": version,
            "checkpoint": found.uri,
        }
        for found, version in trained
    ]
