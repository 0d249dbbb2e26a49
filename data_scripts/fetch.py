"""Fetch and prepare the published data sets of the paper tier.

    python data_scripts/fetch.py --to DIR                  all of them
    python data_scripts/fetch.py zsre nq --to DIR          some
    python data_scripts/fetch.py fever=mend --to DIR       one, from another of its sources (--list shows them)
    python data_scripts/fetch.py zsre --from FOLDER --to DIR   from files that were fetched by hand
    python data_scripts/fetch.py --check DIR               is everything in DIR as it was, and as it should be?
"""

import argparse
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import downloads
from downloads import WITHOUT, FetchError, OfflineError, RefusedError

MANIFEST = Path(__file__).with_name("manifest.json")
RECORD = "fetched.json"  # in DIR: what was fetched and prepared, with hashes
KEPT = "downloads"  # the folder in DIR for files as they came
HUB = "https://huggingface.co"
NEEDED = {"downloads": {"address", "date", "bytes", "sha256"}, "prepared": {"from", "bytes", "sha256", "rows"}}


def read_json(
    path: Path,
) -> dict[str, Any]:
    "A JSON object. Raises `FetchError` if it is damaged."
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no ordinary file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FetchError(f"{path} cannot be read ({error}); delete it to begin anew") from error
    if not isinstance(value, dict):
        raise FetchError(f"{path} holds no JSON object; delete it to begin anew")
    return value


class Folder:
    "DIR, and the record of what lies in it."

    def __init__(
        self,
        path: Path,
    ) -> None:
        self.path, self.file = path, path / RECORD
        self.record = read_json(self.file) if self.file.exists() else {}
        for part in ("downloads", "prepared"):
            if not isinstance(self.record.setdefault(part, {}), dict):
                raise FetchError(f"{self.file}: {part!r} must be an object; delete the file to begin anew")
            for name, found in self.record[part].items():
                if not isinstance(found, dict) or not NEEDED[part] <= found.keys() or type(found["bytes"]) is not int:
                    raise FetchError(f"{self.file}: {name!r} is damaged; delete the file to begin anew")

    def save(self) -> None:
        "Writes the record, all or nothing."
        self.path.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(RECORD + ".part")
        part.write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.file)


def show_progress(
    name: str,
) -> Callable[[int, int | None], None]:
    "Prints how far a download is, on one line of a terminal; nothing elsewhere."
    last = [0.0]

    def told(done: int, total: int | None) -> None:
        if sys.stderr.isatty() and (time.monotonic() - last[0] > 0.5 or done == total):
            last[0] = time.monotonic()
            of = f" of {total / 1e6:.1f}" if total else ""
            print(f"\r  {name}: {done / 1e6:.1f}{of} MB ", end="", file=sys.stderr, flush=True)

    return told


# --- getting one file -------------------------------------------------------------------------------------------------


def copied(
    folder: Path,  # files fetched by hand
    name: str,
    target: Path,
) -> bool:  # was it there?
    "Copies a file that lies under its name anywhere in the folder, or in a zip archive there. Raises `FetchError`."
    part = target.with_name(target.name + ".copied.part")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name == name:
            shutil.copyfile(path, part)
            part.replace(target)
            return True
        if path.suffix == ".zip" and zipfile.is_zipfile(path) and _copied_member(path, name, part):
            part.replace(target)
            return True
    return False


def _copied_member(
    path: Path,  # a zip archive
    name: str,
    target: Path,
) -> bool:  # was it there?
    "Copies one file of an archive, wherever in it the file lies. Raises `FetchError`."
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if Path(member.filename).name == name:
                    if member.file_size > downloads.MOST:
                        raise FetchError(f"{name} in {path} has {member.file_size:,} bytes: more than are taken")
                    with archive.open(member) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
                    return True
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:  # or encrypted
        raise FetchError(f"{name} cannot be taken from {path} ({error}); unpack it by hand") from error
    return False


def from_hub(
    entry: dict[str, Any],
    target: Path,
) -> None:
    "A split of a data set on the hub, as JSON Lines. Raises `OfflineError` within seconds if the hub is out of reach."
    downloads._open(HUB).close()
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "30")
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"  # a data set's own code is never run
    from converters import from_hub as row_of

    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise FetchError("the hub needs `datasets`: pip install datasets, or take another source") from error
    hub, revision = entry["hub"], entry["revision"]
    try:
        rows = load_dataset(hub["name"], hub["config"], split=hub["split"], revision=revision)
    except Exception as error:  # `datasets` raises its own, and those of three other packages
        what = f"{hub['name']} ({hub['config']}, {hub['split']}, revision {revision})"
        reason = str(error).strip().splitlines() or [repr(error)]
        raise FetchError(f"the hub doesn't give {what}: {reason[0]}") from error
    part = target.with_name(target.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row_of(row), ensure_ascii=False) + "\n" for row in rows)
    part.replace(target)


def bring(
    entry: dict[str, Any],  # a download of the manifest
    target: Path,
    by_hand: Path | None,  # a folder of files fetched by hand, looked into first
) -> str:  # where it came from
    "Puts the file where it belongs. Raises `FetchError`."
    target.parent.mkdir(parents=True, exist_ok=True)
    if by_hand is not None and copied(by_hand, entry["file"], target):
        return "by hand"
    try:
        if "hub" in entry:
            from_hub(entry, target)
            return f"{HUB}/datasets/{entry['hub']['name']}"
        address = entry.get("address") or downloads.drive_address(entry["drive_folder"], entry["file"])
        known = entry.get("bytes")  # a file that is somewhat longer is told by its size, once it is here
        most = max(2 * known, 16 << 20) if known else downloads.MOST
        downloads.download(address, target, show_progress(entry["file"]), most)
        return address
    except FetchError as error:
        if by_hand is None:
            raise
        raise type(error)(f"{by_hand} holds no {entry['file']}, nor does a zip archive there; and {error}") from error


def expectations(
    entry: dict[str, Any],
    known: dict[str, Any] | None,  # what was recorded of it before
    trusted: bool,  # are its hash and rows to be believed, whatever was expected?
) -> dict[str, Any]:
    "What a download must be: what the manifest says, and the hash of the first download."
    if trusted:
        return {}
    expected = {name: entry.get(name) for name in ("bytes", "sha256", "rows")}
    if known and not entry.get("changes"):
        expected["sha256"] = expected["sha256"] or known["sha256"]
        if known.get("trusted"):
            expected |= {"bytes": None, "rows": None}
    return expected


def fetch(
    folder: Folder,
    key: str,  # such as zsre-malmen
    entry: dict[str, Any],
    by_hand: Path | None,
    trust: Sequence[str],  # names of files to accept as they are
) -> Path:
    "One download, checked and recorded. What lies there and is sound isn't fetched again."
    name = f"{key}/{entry['file']}"
    target, known = folder.path / KEPT / name, folder.record["downloads"].get(name)
    expected, trusted = expectations(entry, known, entry["file"] in trust), entry["file"] in trust
    origin = known["address"] if known else "there already"
    if target.exists():
        try:
            found = downloads.examine(target, expected)
        except RefusedError as error:
            print(f"  {error}; fetching it again")
    if not target.exists():
        origin = bring(entry, target, by_hand)
        try:
            found = downloads.examine(target, expected)
        except RefusedError as error:
            hint = f"If you have reason to believe the file, add --trust {entry['file']}"
            raise RefusedError(f"{error} (from {origin}). {hint}") from None
    date = known["date"] if known and known["sha256"] == found["sha256"] else time.strftime("%Y-%m-%d")
    kept = {"trusted": True} if trusted or (known or {}).get("trusted") else {}
    folder.record["downloads"][name] = {"address": origin, "date": date, **found, **kept}
    folder.save()
    print(f"  {entry['file']}: {found['bytes']:,} bytes" + (f", {found['rows']:,} rows" if "rows" in found else ""))
    return target


BROKEN = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


# --- preparing --------------------------------------------------------------------------------------------------------


def prepare(
    folder: Folder,
    key: str,
    made: dict[str, Any],  # an item of `becomes`
    fetched: dict[str, Path],  # by file name
    trust: Sequence[str],
) -> None:
    "Converts, checks the rows, and puts the file in its place in one move. Raises `FetchError` and `RefusedError`."
    from converters import CONVERTERS

    sources = {role: fetched.get(name) or folder.path / name for role, name in made["from"].items()}
    if missing := [str(path) for path in sources.values() if not path.exists()]:
        raise FetchError(f"{made['file']} is made with {missing[0]}, which isn't there; fetch that first")
    hashes = {made["from"][role]: downloads.sha256(path) for role, path in sources.items()}
    out, place = folder.path / KEPT / key / f"prepared-{Path(made['file']).name}", folder.path / made["file"]
    known = folder.record["prepared"].get(made["file"])
    if known and known["from"] == hashes and place.is_file() and downloads.sha256(place) == known["sha256"]:
        print(f"  -> {made['file']}: {known['rows']:,} rows, as it was")
        return
    try:
        rows = CONVERTERS[made["converter"]](sources, out)
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise RefusedError(f"{made['file']} cannot be made of {', '.join(made['from'].values())}: {reason}") from error
    allowed = made["rows"] if isinstance(made["rows"], list) else [made["rows"]]
    if made["rows"] is not None and rows not in allowed and not set(made["from"].values()) & set(trust):
        aside = downloads.refuse(out)
        raise RefusedError(f"{made['file']}: expected {made['rows']} rows, made {rows}; put aside as {aside}")
    place.parent.mkdir(parents=True, exist_ok=True)
    found = {"bytes": out.stat().st_size, "sha256": downloads.sha256(out), "rows": rows}
    out.replace(place)
    folder.record["prepared"][made["file"]] = {"source": key, "from": hashes, **found}
    folder.save()
    print(f"  -> {made['file']}: {rows:,} rows")


def chosen(
    names: Sequence[str],  # such as zsre or fever=mend; none for all
    manifest: dict[str, Any],
) -> list[tuple[str, str]]:  # (data set, source), those needed by others before them
    "What was asked for. Raises `FetchError` with what there is for a name that isn't known."
    sets, pairs = manifest["data_sets"], {}
    for name in names or sets:
        name, _, source = name.partition("=")
        if name not in sets:
            raise FetchError(f"there is no data set {name!r}; there are: {', '.join(sets)}")
        sources = sets[name]["sources"]
        source = source or next(iter(sources))
        if source not in sources:
            raise FetchError(f"{name} has no source {source!r}; it has: {', '.join(sources)}")
        pairs[name] = source
    order = {}
    for name, source in pairs.items():
        for needed in sets[name]["sources"][source].get("needs", ()):
            order.setdefault(needed, pairs.get(needed) or next(iter(sets[needed]["sources"])))
        order[name] = source
    return list(order.items())


def run(
    names: Sequence[str],
    to: Path,
    by_hand: Path | None = None,
    trust: Sequence[str] = (),
    manifest: dict[str, Any] | None = None,
) -> int:  # how many data sets failed
    "Fetches and prepares. One data set's failure doesn't keep the others from coming; a dead network ends it at once."
    manifest, failed = manifest or read_json(MANIFEST), []
    pairs, folder = chosen(names, manifest), Folder(to)
    for name, source in pairs:
        entry, key = manifest["data_sets"][name]["sources"][source], f"{name}-{source}"
        print(f"{name} ({source}): {entry['what']}\n  licence: {manifest['data_sets'][name]['licence']}")
        try:
            fetched = {item["file"]: fetch(folder, key, item, by_hand, trust) for item in entry["downloads"]}
            for made in entry["becomes"]:
                prepare(folder, key, made, fetched, trust)
        except FetchError as error:
            failed.append(name)
            others = [other for other in manifest["data_sets"][name]["sources"] if other != source]
            also = f" Other sources: {', '.join(f'{name}={other}' for other in others)}." if others else ""
            print(f"fetch.py: error: {name}: {error}.{also}".replace("..", "."), file=sys.stderr)
            if isinstance(error, OfflineError):
                break
    return len(failed)


# --- checking ---------------------------------------------------------------------------------------------------------


def check(
    to: Path,
    manifest: dict[str, Any] | None = None,
) -> int:  # how many problems
    "Compares every recorded file in DIR with its record, and names what was left half done or put aside."
    if not (to / RECORD).exists():
        raise FetchError(f"{to} has no {RECORD}: nothing was fetched into it. {WITHOUT}")
    folder, problems = Folder(to), 0
    places = {f"{KEPT}/{name}": found for name, found in folder.record["downloads"].items()}
    for name, found in (places | folder.record["prepared"]).items():
        path, said = to / name, "as recorded"
        if not path.is_file():
            said = "missing"
        elif path.stat().st_size != found["bytes"]:
            said = f"has {path.stat().st_size:,} bytes, not {found['bytes']:,}"
        elif downloads.sha256(path) != found["sha256"]:
            said = "has another content (sha256)"
        problems += said != "as recorded"
        print(f"{name}: {said}")
    for path in sorted(to.rglob("*")):
        if path.suffix in (".part", ".refused"):
            print(f"{path.relative_to(to)}: {'not complete' if path.suffix == '.part' else 'was refused'}")
    there = {Path(name).parts[0] for name in folder.record["prepared"]}
    absent = [name for name in (manifest or read_json(MANIFEST))["data_sets"] if name not in there]
    print(f"{problems} problems" + (f"; not prepared: {', '.join(absent)}" if absent else ""))
    return problems


def stated_rows(
    rows: int | list[int] | None,  # a list where published statements differ
) -> str:
    "How many rows a download has; nothing if none are stated."
    if rows is None:
        return ""
    return f" ({' or '.join(f'{count:,}' for count in (rows if isinstance(rows, list) else [rows]))} rows)"


def listing(
    manifest: dict[str, Any],
) -> str:
    "The data sets and their sources."
    lines = []
    for name, entry in manifest["data_sets"].items():
        lines.append(f"{name}: {entry['what']}. For {entry['used_for']}. Licence: {entry['licence']}")
        for source, what in entry["sources"].items():
            files = ", ".join(item["file"] + stated_rows(item["rows"]) for item in what["downloads"])
            lines.append(f"  {name}={source}: {what['what']}\n    {files}")
    return "\n".join(lines)


def main(
    arguments: Sequence[str] | None = None,
) -> int:  # the exit code: 0, or 1 if anything is wrong
    "The command line."
    parser = argparse.ArgumentParser("fetch.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME[=SOURCE]", help="data sets (default: all)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where they shall lie; MALMEN_DATA then names it")
    parser.add_argument("--from", dest="by_hand", type=Path, metavar="FOLDER", help="files fetched by hand")
    parser.add_argument("--trust", nargs="+", default=[], metavar="FILE", help="accept these files as they are")
    parser.add_argument("--check", type=Path, metavar="DIR", help="check a folder, fetch nothing")
    parser.add_argument("--list", action="store_true", help="the data sets and their sources")
    given = parser.parse_args(arguments)
    try:
        if given.list:
            print(listing(read_json(MANIFEST)))
            return 0
        if given.check:
            return int(check(given.check) > 0)
        if given.to is None:
            parser.error("say where to: --to DIR")
        if given.by_hand is not None and not given.by_hand.is_dir():
            raise FetchError(f"{given.by_hand} is no folder")
        return int(run(given.names, given.to, given.by_hand, given.trust) > 0)
    except (FetchError, OSError) as error:
        print(f"fetch.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfetch.py: stopped; run it again, it continues", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
