"""What rows need: weights, second networks, archives; sizes, licences, sources, and getting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .datasets import DATASETS, data_set_of, find_data, get_data
from .plan import Row
from .weights import NETWORKS, WEIGHTS, get_model, get_network, is_there

THERE, DOWNLOADED, BY_HAND, GIVEN = "there", "downloaded", "by hand", "given"
NO_SUM = "none published; recorded"


@dataclass(frozen=True)
class Need:
    """One thing that rows need.

    Attributes:
        name: of the weights, network, archive or step.
        gigabytes: about its size; 0 where that is not known.
        licence: as published.
        source: where it is.
        checksum: of an archive, and who published it.
        state: `there`, `downloaded` (it will be), `by hand` or `given` (by the user).
        how: what has to be done by hand.
    """

    name: str
    gigabytes: float
    licence: str
    source: str
    checksum: str = ""
    state: str = DOWNLOADED
    how: str = ""


def needs(rows: Iterable[Row], root: Path, data: Path) -> list[Need]:
    """What the rows that can be run need, each thing once.

    Args:
        rows: of a plan.
        root: folder of weights and downloads.
        data: folder of the data sets.
    """
    rows = [row for row in rows if not row.problem]
    found = [_weights(name, root) for name in dict.fromkeys(row.weights for row in rows)]
    for where in dict.fromkeys(where for row in rows for _, where in row.networks):
        gigabytes, licence = NETWORKS.get(where, (0.0, "see its card"))
        found.append(Need(where, gigabytes, licence, where, state=DOWNLOADED if _on_hub(where) else GIVEN))
    missing: dict[str, bool] = {}
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        if (key := data_set_of(benchmark)) is not None:
            missing[key] = missing.get(key, False) or find_data(benchmark, data) is None
    for key, lacks in missing.items():
        found += _data_set(key, root, data) if lacks else [_there(key, data)]
    return found


def _weights(name: str, root: Path) -> Need:
    row, place = WEIGHTS[name], root / "weights" / name
    given = place.is_dir() and any(place.iterdir())
    state = THERE if is_there(name, root) or given else BY_HAND if row.by_hand else DOWNLOADED
    how = f"{row.by_hand}; put what you get into {place}" if state == BY_HAND else ""
    return Need(row.title, row.gigabytes, row.licence, row.hub or "see below", state=state, how=how)


def _there(key: str, data: Path) -> Need:
    return Need(DATASETS[key].title, DATASETS[key].gigabytes, DATASETS[key].licence, str(data), state=THERE)


def _data_set(key: str, root: Path, data: Path) -> Iterator[Need]:
    row, folder = DATASETS[key], root / "downloads"
    for archive in row.archives:
        here = (folder / archive.name).exists()
        by_hand = bool(archive.login) and not here
        yield Need(
            f"{row.title}: {archive.name}",
            archive.gigabytes,
            row.licence,
            archive.url,
            f"{archive.checksum}, of {archive.source}" if archive.checksum else NO_SUM,
            THERE if here else BY_HAND if by_hand else DOWNLOADED,
            f"{archive.login}, and put it into {folder}" if by_hand else "",
        )
    if row.by_hand:
        how = row.by_hand.format(data=data)
        yield Need(f"{row.title}: label maps", 0.0, row.licence, row.page, state=BY_HAND, how=how)


def _on_hub(where: str) -> bool:
    return "/" in where and not Path(where).exists()


def get(
    rows: Sequence[Row], root: Path, data: Path, say: Callable[[str], None], complain: Callable[[str], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """Gets all that the rows that can be run need, as far as it can be had.

    Args:
        rows, root, data: as `needs`.
        say: told what is being got.
        complain: told what cannot be had, and how it can.

    Returns:
        What each weights are loaded by; and why a thing cannot be had. Both by the key in `WEIGHTS`, the network's id,
        or the benchmark.
    """
    wanted: dict[str, Callable[[], Any]] = {}
    for row in rows:
        if row.problem:
            continue
        wanted.setdefault(row.weights, partial(get_model, row.weights, root))
        for _, where in row.networks:
            if _on_hub(where):
                wanted.setdefault(where, partial(get_network, where))
        if data_set_of(row.benchmark) is not None:
            wanted.setdefault(row.benchmark, partial(get_data, row.benchmark, data, root / "downloads"))
    models, lacking = {}, {}
    for name, getter in wanted.items():
        say(f"getting {name}")
        try:
            there = getter()
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            lacking[name] = " ".join(str(said).split())
            complain(f"{name}: {lacking[name]}")
        else:
            models[name] = str(there) if name in WEIGHTS else ""
    return models, lacking
