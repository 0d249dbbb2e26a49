"""Files from the network: streamed, resumed where they broke off, and refused if they aren't what was expected."""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = 15.0  # seconds without a byte
ATTEMPTS = 4  # connections for one file, each beginning where the last broke off
MOST = 16 << 30  # bytes of a file whose size nobody published
PAGE = 16 << 20  # bytes of a web page
PAUSE = 1.0  # seconds before the second attempt, doubled each time
DRIVE_FOLDER = "https://drive.google.com/embeddedfolderview?id={}#list"
DRIVE_FILE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
WITHOUT = (
    "Without a network there is the tiny tier, which needs no data (malmen-repro reproduce --tier tiny), "
    "and files fetched elsewhere can be given with --from FOLDER"
)


class FetchError(Exception):
    "Something that was asked for cannot be had; the message says what, where, and what to do."


class OfflineError(FetchError):
    "A host cannot be reached."


class RefusedError(FetchError):
    "A file isn't what was expected. It lies beside its place, its name ending in .refused."


# --- one file ---------------------------------------------------------------------------------------------------------


def _open(
    address: str,
    start: int = 0,  # the first byte wanted
    same: str | None = None,  # the ETag or date of the part that is there
) -> Any:
    "The open response. Raises `OfflineError`, `FetchError`, and `HTTPError` for 416 only."
    request = urllib.request.Request(address, headers={"User-Agent": "malmen-repro"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if same:
            request.add_header("If-Range", same)
    host = urllib.parse.urlsplit(address).hostname
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise
        gone = "; it may have moved" if error.code in (403, 404, 410) else ""
        raise FetchError(f"{address} answers {error.code} {error.reason}{gone}") from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OfflineError(f"{host} cannot be reached ({reason}). {WITHOUT}") from error


def _total(
    response: Any,
    start: int,  # bytes that were there before
) -> int | None:
    "The size of the whole file, if the server says."
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range") or "")
    length = response.headers.get("Content-Length")
    return int(whole[1]) if whole else start + int(length) if length else None


def _continues(
    response: Any,
    start: int,  # the first byte that was asked for
) -> bool:
    "Does the response hold the rest, and not the whole?"
    return response.status == 206 and (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-")


def _continue(
    address: str,
    part: Path,  # what is there so far, if anything
    progress: Callable[[int, int | None], None],  # told bytes and total
    most: int,  # bytes
) -> bool:  # is the file whole?
    """One connection: the rest of the file, or all of it if the server cannot continue or the file has changed there.

    Raises `FetchError` for more bytes than `most`.
    """
    mark = part.with_name(part.name + ".mark")
    start = part.stat().st_size if part.exists() else 0
    same = mark.read_text(encoding="utf-8") if start and mark.exists() else None
    try:
        response = _open(address, start if same else 0, same)
    except urllib.error.HTTPError as error:  # 416: nothing lies beyond what is there
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
        if whole and int(whole[1]) == start:
            return True
        part.unlink()
        return False
    with response:
        start = start if _continues(response, start) else 0
        strong = response.headers.get("ETag") or ""
        mark.write_text(strong if strong.startswith('"') else response.headers.get("Last-Modified") or "", "utf-8")
        total = _total(response, start)
        if (total or 0) > most:
            raise FetchError(f"{address} has {total:,} bytes, and at most {most:,} are taken")
        with part.open("ab" if start else "wb") as file:
            try:
                while block := response.read(BLOCK):
                    file.write(block)
                    if file.tell() > most:
                        raise FetchError(f"{address} sends more than {most:,} bytes; remove {part}")
                    progress(file.tell(), total)
            except (TimeoutError, ConnectionError, http.client.HTTPException):
                return False
            return total is None or file.tell() >= total


def download(
    address: str,
    target: Path,  # where the file shall lie
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    most: int = MOST,  # bytes
) -> None:
    """The file at `address`, by way of `target`.part, which a later call continues.

    Raises `OfflineError` if the host cannot be reached, `FetchError` if it hasn't the file, keeps breaking off or sends
    more than `most`.
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            if _continue(address, part, progress, most):
                part.with_name(part.name + ".mark").unlink(missing_ok=True)
                part.replace(target)
                return
        except OSError as error:
            raise FetchError(f"{target} cannot be written: {error.strerror or error}") from error
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    have = part.stat().st_size if part.exists() else 0
    raise FetchError(f"{address} broke off {ATTEMPTS} times, at {have:,} bytes; run the command again, it continues")


# --- a folder on Google Drive -----------------------------------------------------------------------------------------


def _drive_page(
    folder: str,  # its id
) -> list[tuple[str, str, bool]]:  # (id, name, is it a folder?)
    "What a public folder's page lists."
    with _open(DRIVE_FOLDER.format(folder)) as response:
        page = response.read(PAGE).decode("utf-8", "replace")
    entries = re.findall(r'id="entry-([\w-]+)".*?href="([^"]+)".*?flip-entry-title">([^<]+)<', page, re.DOTALL)
    return [(identity, unescape(name).strip(), "/folders/" in link) for identity, link, name in entries]


def drive_address(
    folder: str,  # the id of a public folder
    name: str,  # of a file in it, or in a folder of it
    depth: int = 3,  # levels of folders looked into
) -> str:
    "The address of one file. Raises `FetchError`, with what to do by hand, if the page doesn't list it."
    level, seen = [folder], []
    for _ in range(depth):
        entries = [entry for identity in level for entry in _drive_page(identity)]
        for identity, found, is_folder in entries:
            if found == name and not is_folder:
                return DRIVE_FILE.format(identity)
        seen += [found for _, found, _ in entries]
        level = [identity for identity, _, is_folder in entries if is_folder]
    by_hand = f"open https://drive.google.com/drive/folders/{folder}, fetch {name} by hand, and give --from FOLDER"
    raise FetchError(f"the folder's page lists no file {name} (it lists: {', '.join(seen) or 'nothing'}); {by_hand}")


# --- is it what was expected? -----------------------------------------------------------------------------------------


def sha256(
    path: Path,
) -> str:
    "The file's SHA-256, as hexadecimal digits."
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def count_rows(
    path: Path,  # JSON (a list) or JSON Lines, not compressed
) -> int:
    "How many rows a file has. Raises `ValueError` if it isn't JSON, such as a web page that says to log in."
    with path.open("rb") as file:
        first = file.read(512).lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
        file.seek(0)
        if first == b"<":
            raise ValueError("it is a web page")
        if first == b"[":
            return len(json.load(file))
        rows = 0
        for line in file:
            if line.strip():
                json.loads(line)
                rows += 1
    return rows


def examine(
    path: Path,
    expected: dict[str, Any],  # bytes, sha256, rows (a number, or a list of those allowed); null if nobody knows
) -> dict[str, Any]:  # what was found: bytes, sha256, rows
    "Compares a file with what is known of it. Raises `RefusedError` and puts it aside if anything differs."
    found: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    problems = []
    if not path.name.endswith(".zip"):
        try:
            found["rows"] = count_rows(path)
        except (ValueError, RecursionError) as error:
            problems.append(f"it can't be read as JSON ({error})")
    for name, value in found.items():
        allowed = expected.get(name)
        if allowed is not None and value not in (allowed if isinstance(allowed, list) else [allowed]):
            problems.append(f"{name}: expected {allowed}, found {value}")
    if not problems:
        return found
    aside = refuse(path)
    raise RefusedError(f"{path} isn't what was expected: {'; '.join(problems)}. It was put aside as {aside.name}")


def refuse(
    path: Path,
) -> Path:  # where it lies now
    "Puts a file aside, under a name that nothing reads."
    aside = path.with_name(path.name + ".refused")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{number}.refused")
    os.replace(path, aside)
    return aside
