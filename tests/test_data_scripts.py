"""The scripts that fetch data: a server of our own that breaks off and lies, a folder by hand, conversion, checks."""

import json
import lzma
import os
import re
import socket
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_scripts"))

import converters  # noqa: E402
import downloads  # noqa: E402
import fetch  # noqa: E402
from downloads import FetchError, OfflineError, RefusedError  # noqa: E402

from malmen_repro.facts import LABELS, load_facts  # noqa: E402
from malmen_repro.replication.claims import fever_claims, pararel_claims  # noqa: E402

NQ = [{"question": f"who is number {i}", "answer": [f"Name {i}", "X"]} for i in range(40)]
KILT = [
    {
        "id": str(i),
        "input": f"Claim {i} is right.",
        "output": [{"provenance": []}, {"answer": LABELS[i % 2]}],
    }
    for i in range(40)
]
MEND = [
    row | {"prediction": "SUPPORTS", "alternatives": ["REFUTES"], "filtered_rephrases": [f"Right is claim {i}."]}
    for i, row in enumerate(KILT)
]
MALMEN = [
    {
        "prompt": row["input"],
        "equiv_prompt": row["filtered_rephrases"],
        "alt": LABELS[1 - i % 2],
        "unrel_prompt": f"Unrelated {i}.",
        "unrel_ans": LABELS[i // 2 % 2],
    }
    for i, row in enumerate(MEND)
]
FEVER2 = [{"claim": f"Adversarial {i}.", "label": [*LABELS, "NOT ENOUGH INFO"][i % 3]} for i in range(30)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path):
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().split("\n") if line]


# --- a server ---------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((path, self.headers.get("Range")))
        if path not in server.files:
            return self.send_error(404)
        body, asked, start = server.files[path], self.headers.get("Range"), 0
        same = self.headers.get("If-Range") in (None, server.tag)
        if asked and server.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        most = server.breaks.pop(0) if server.breaks else len(body)
        self.wfile.write(body[start : start + most])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.setattr(downloads, "BLOCK", 64)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.files, made.breaks, made.asked, made.tag, made.ranges = {}, [], [], '"one"', True
    made.address = f"http://127.0.0.1:{made.server_address[1]}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def dead():
    "An address at which nobody answers."
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


BODY = bytes(range(256)) * 8


def test_download(server, tmp_path):
    server.files["/a"] = BODY
    told = []
    downloads.download(f"{server.address}/a", tmp_path / "deep" / "a", lambda *done: told.append(done))
    assert (tmp_path / "deep" / "a").read_bytes() == BODY
    assert told[-1] == (len(BODY), len(BODY)) and len(told) == len(BODY) // 64
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]


def test_a_download_takes_no_more_than_its_limit(server, tmp_path, monkeypatch):
    server.files["/a"] = BODY
    with pytest.raises(FetchError, match="has 2,048 bytes, and at most 2,000 are taken"):
        downloads.download(f"{server.address}/a", tmp_path / "a", most=2000)
    monkeypatch.setattr(downloads, "_total", lambda *_: None)  # a server that does not say the size
    with pytest.raises(FetchError, match=r"sends more than 2,000 bytes; remove .*a\.part"):
        downloads.download(f"{server.address}/a", tmp_path / "a", most=2000)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size < 2200


def test_a_download_that_breaks_off_continues_where_it_was(server, tmp_path):
    server.files["/a"], server.breaks = BODY, [700, 500]
    downloads.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=700-", "bytes=1200-"]


def test_a_later_run_continues_too(server, tmp_path):
    server.files["/a"], server.breaks = BODY, [100] * downloads.ATTEMPTS
    with pytest.raises(FetchError, match=r"broke off 4 times, at 400 bytes; run the command again"):
        downloads.download(f"{server.address}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == 400
    downloads.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked[-1] == ("/a", "bytes=400-")


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.files["/a"], server.breaks = BODY, [100] * downloads.ATTEMPTS
    with pytest.raises(FetchError):
        downloads.download(f"{server.address}/a", tmp_path / "a")
    server.files["/a"], server.tag = BODY[::-1], '"two"'
    downloads.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY[::-1]


@pytest.mark.parametrize(("ranges", "tag"), [(False, '"one"'), (True, None), (True, 'W/"weak"')])
def test_a_server_that_cannot_continue(server, tmp_path, ranges, tag):
    server.files["/a"], server.breaks, server.ranges, server.tag = BODY, [700], ranges, tag
    downloads.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and len(server.asked) == 2


def test_a_part_that_was_whole_already(server, tmp_path):
    server.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(BODY)
    (tmp_path / "a.part.mark").write_text('"one"')
    downloads.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and len(server.asked) == 1


def test_a_part_that_is_too_long_is_fetched_anew(server, tmp_path):
    server.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(BODY + b"more")
    (tmp_path / "a.part.mark").write_text('"one"')
    downloads.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY


def test_not_found(server, tmp_path):
    with pytest.raises(FetchError, match="answers 404 Not Found; it may have moved") as caught:
        downloads.download(f"{server.address}/a", tmp_path / "a")
    assert not isinstance(caught.value, OfflineError) and len(server.asked) == 1


def test_no_network_is_said_within_seconds(dead, tmp_path):
    start = time.monotonic()
    with pytest.raises(OfflineError, match=r"127.0.0.1 cannot be reached.*--tier tiny.*--from FOLDER"):
        downloads.download(f"{dead}/a", tmp_path / "a")
    assert time.monotonic() - start < 5


def test_a_place_that_cannot_be_written(server, tmp_path):
    server.files["/a"] = BODY
    (tmp_path / "a.part").mkdir()
    with pytest.raises(FetchError, match="cannot be written"):
        downloads.download(f"{server.address}/a", tmp_path / "a")


# --- Google Drive's pages ---------------------------------------------------------------------------------------------


def drive_page(*entries):
    text = '<div class="flip-entry" id="entry-{}"><a href="{}"><div class="flip-entry-title">{}</div></a></div>'
    return "".join(text.format(*entry) for entry in entries).encode()


@pytest.fixture
def drive(server, monkeypatch):
    monkeypatch.setattr(downloads, "DRIVE_FOLDER", server.address + "/folder/{}#list")
    monkeypatch.setattr(downloads, "DRIVE_FILE", server.address + "/file/{}?confirm=t")
    server.files["/folder/top"] = drive_page(
        ("sub-1", "https://drive.example/drive/folders/sub-1", "zsre"),
        ("f0", "https://drive.example/file/d/f0", "a&amp;b"),
    )
    server.files["/folder/sub-1"] = drive_page(("f_1", "https://drive.example/file/d/f_1/view", "zsre_train.json"))
    return server


def test_files_on_drive_are_found_by_name(drive):
    assert downloads.drive_address("top", "zsre_train.json") == f"{drive.address}/file/f_1?confirm=t"
    assert downloads.drive_address("top", "a&b") == f"{drive.address}/file/f0?confirm=t"


@pytest.mark.parametrize("name", ["zsre", "other.json"])
def test_files_that_drive_does_not_list(drive, name):
    listed = r"lists no file .*\(it lists: zsre, a&b, zsre_train.json\).*drive/folders/top.*"
    with pytest.raises(FetchError, match=listed):
        downloads.drive_address("top", name)
    with pytest.raises(FetchError, match="it lists: nothing"):
        drive.files["/folder/top"] = b"<html>sign in</html>"
        downloads.drive_address("top", name)


# --- refusing ---------------------------------------------------------------------------------------------------------

HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of b"test"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"test")
    assert downloads.sha256(tmp_path / "a") == HASH


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (lines(NQ), 40),
        (json.dumps(NQ).encode(), 40),
        (b"\xef\xbb\xbf " + json.dumps(NQ).encode(), 40),
        (b"\n" + lines(NQ) + b"\n \n", 40),
        (b"", 0),
    ],
)
def test_rows_are_counted(tmp_path, content, rows):
    (tmp_path / "a").write_bytes(content)
    assert downloads.count_rows(tmp_path / "a") == rows


@pytest.mark.parametrize(
    ("expected", "problem"),
    [
        ({"bytes": 7}, r"bytes: expected 7, found \d+"),
        ({"sha256": HASH}, f"sha256: expected {HASH}, found [0-9a-f]{{64}}"),
        ({"rows": 39}, "rows: expected 39, found 40"),
        ({"rows": [38, 39]}, r"rows: expected \[38, 39\], found 40"),
    ],
)
def test_what_does_not_match_is_refused_and_put_aside(tmp_path, expected, problem):
    for aside in ("a.refused", "a.2.refused", "a.3.refused"):
        (tmp_path / "a").write_bytes(lines(NQ))
        with pytest.raises(RefusedError, match=f"{problem}.*put aside as {aside}"):
            downloads.examine(tmp_path / "a", expected)
        assert not (tmp_path / "a").exists() and (tmp_path / aside).read_bytes() == lines(NQ)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"<!DOCTYPE html><p>Sign in", "web page"), (lines(NQ)[:-9], "JSON"), (b"\xff\xfe", "JSON")],
)
def test_what_is_no_data_is_refused(tmp_path, content, problem):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RefusedError, match=problem):
        downloads.examine(tmp_path / "a", {})


def test_what_matches_is_described(tmp_path):
    (tmp_path / "a").write_bytes(lines(NQ))
    found = downloads.examine(tmp_path / "a", {"bytes": None, "sha256": None, "rows": [40, 41]})
    assert found == {"bytes": len(lines(NQ)), "sha256": downloads.sha256(tmp_path / "a"), "rows": 40}


# --- converting -------------------------------------------------------------------------------------------------------


def sources(folder, **rows):
    made = {}
    for name, content in rows.items():
        made[name] = folder / f"{name}.jsonl"
        made[name].write_bytes(lines(content))
    return made


@pytest.mark.parametrize("layout", [lines, lambda rows: json.dumps(rows).encode()])
def test_rows_as_published(tmp_path, layout):
    (tmp_path / "nq").write_bytes(layout(NQ))
    assert converters.as_published({"facts": tmp_path / "nq"}, tmp_path / "out.jsonl.xz") == 40
    assert read(tmp_path / "out.jsonl.xz") == NQ


def test_fever2_loses_the_third_label(tmp_path):
    out = tmp_path / "out.jsonl.xz"
    assert converters.verified_claims(sources(tmp_path, claims=FEVER2), out) == 20
    assert {fact.answer for fact in load_facts(out)} == set(LABELS)
    for rows in ([{"claim": "a", "label": "MAYBE"}], [{"claim": "a", "label": "NOT ENOUGH INFO"}]):
        with pytest.raises(converters.ConversionError):
            converters.verified_claims(sources(tmp_path, claims=rows), out)


def test_kilt(tmp_path):
    out = tmp_path / "out.jsonl.xz"
    assert converters.kilt_claims(sources(tmp_path, claims=KILT), out) == 40
    assert [fact.pair for fact in load_facts(out)] == [(r["input"], LABELS[i % 2]) for i, r in enumerate(KILT)]
    with pytest.raises(converters.ConversionError, match="'Who'"):
        converters.kilt_claims(sources(tmp_path, claims=[{"input": "Who", "output": [{"answer": "me"}]}]), out)


def test_zsre_of_mend_gets_questions(tmp_path):
    zsre = [row | {"input": f"Who is {i}?", "output": [{"answer": f"N{i}"}]} for i, row in enumerate(MEND)]
    zsre[3] |= {"filtered_rephrases": []}
    out = tmp_path / "out.jsonl.xz"
    assert converters.with_questions(sources(tmp_path, facts=zsre, unrelated=NQ), out) == 39
    facts = load_facts(out)
    assert [fact.prompt for fact in facts] == [row["input"] for i, row in enumerate(zsre) if i != 3]
    assert {fact.unrelated_pair for fact in facts} <= {(row["question"], row["answer"][0]) for row in NQ}
    with pytest.raises(converters.ConversionError, match="rephrase"):
        converters.with_questions(sources(tmp_path, facts=zsre[3:4], unrelated=NQ), out)


def test_fever_of_mend_gets_halves_of_fever2(tmp_path):
    made, unrelated = sources(tmp_path, facts=MEND, unrelated=[r for r in FEVER2 if r["label"] in LABELS]), []
    for name in ("with_claims_to_train", "with_claims_to_evaluate"):
        assert converters.CONVERTERS[name](made, tmp_path / "out.jsonl.xz") == 40
        facts = load_facts(tmp_path / "out.jsonl.xz")
        unrelated.append({fact.unrelated_pair for fact in facts})
        assert [fact.answer for fact in facts] == [LABELS[i % 2] for i in range(40)]
    assert not unrelated[0] & unrelated[1] and sorted(map(len, unrelated)) == [10, 10]


@pytest.mark.parametrize("positive", [None, 1, 0, 1.0])
def test_labels_of_malmen_get_their_names(tmp_path, positive):
    number = {LABELS[0]: positive, LABELS[1]: None if positive is None else 1 - positive}
    named = {"alt", "unrel_ans"}
    rows = MALMEN if positive is None else [{k: number[v] if k in named else v for k, v in r.items()} for r in MALMEN]
    out = tmp_path / "out.jsonl.xz"
    assert converters.malmen_claims(sources(tmp_path, facts=rows, labels=KILT), out) == 40
    assert read(out) == MALMEN


def test_one_number_alone_is_enough(tmp_path):
    rows = [row | {"alt": 0, "unrel_ans": i // 2 % 2} for i, row in enumerate(MALMEN) if row["alt"] == "REFUTES"]
    out = tmp_path / "out.jsonl.xz"
    converters.malmen_claims(sources(tmp_path, facts=rows, labels=KILT), out)
    assert {row["alt"] for row in read(out)} == {"REFUTES"} and {row["unrel_ans"] for row in read(out)} == set(LABELS)


def test_numbers_that_agree_with_no_label(tmp_path):
    for rows in (
        [row | {"alt": i // 2 % 2} for i, row in enumerate(MALMEN)],  # half right
        [row | {"alt": 1, "prompt": "never heard of"} for row in MALMEN],
        [row | {"alt": 2 * (i % 4 == 0) + (i % 2)} for i, row in enumerate(MALMEN)],  # two numbers for one label
    ):
        with pytest.raises(converters.ConversionError, match="number"):
            converters.malmen_claims(sources(tmp_path, facts=rows, labels=KILT), tmp_path / "out")


def zero_shot(subject, *questions):
    return {"input": f"{subject} [SEP] occupation", "meta": {"template_questions": list(questions)}, "output": []}


def test_subjects_of_questions(tmp_path):
    train = [zero_shot("Ada", "What was Ada?", "Ada's trade?"), zero_shot("Bob", "Who?"), zero_shot("Eve", "Who?")]
    dev = [zero_shot("Bob", "What was Bob? "), zero_shot("Ada", "Ada's trade?")]
    out = tmp_path / "out.jsonl.xz"
    assert converters.question_subjects(sources(tmp_path, train=train, dev=dev), out) == 3
    expected = {"What was Ada?": "Ada", "Ada's trade?": "Ada", "What was Bob?": "Bob"}  # "Who?" may be either
    assert {row["question"]: row["subject"] for row in read(out)} == expected
    rome = [{"subject": "Ada", "src": "What was Ada?", "rephrase": "x", "answers": ["y"]}]
    assert converters.question_subjects(sources(tmp_path, facts=rome), out) == 1
    assert read(out) == [{"question": "What was Ada?", "subject": "Ada"}]
    with pytest.raises(converters.ConversionError, match="no question"):
        converters.question_subjects(sources(tmp_path, train=train[1:]), out)


def test_passages(tmp_path, monkeypatch):
    texts = ["", " = Heading = \n", *(f" Passage {i} . \n" for i in range(6)), " = = Part = = \n", "a\nb"]
    made_, out = sources(tmp_path, rows=[{"text": text} for text in texts]), tmp_path / "out.txt.xz"
    assert converters.passages(made_, out) == 7
    found = lzma.decompress(out.read_bytes()).decode().splitlines()
    assert set(found) == {*(f"Passage {i} ." for i in range(6)), "a b"}
    monkeypatch.setattr(converters, "PASSAGES", 3)
    assert converters.passages(made_, out) == 3
    first = out.read_bytes()
    assert converters.passages(made_, out) == 3 and out.read_bytes() == first
    with pytest.raises(converters.ConversionError, match="no passage"):
        converters.passages(sources(tmp_path, rows=[{"text": ""}]), out)


def pararel_archive(path, names=("P36",)):
    patterns = ["The capital of [X] is [Y] .", "[Y] is the capital city of [X].", "[X] is governed from [Y]."]
    facts = [{"sub_label": f"Land {i}", "obj_label": f"Town {i}", "uuid": "x"} for i in range(8)]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(
                f"pararel-main/data/pattern_data/graphs_json/{name}.jsonl",
                lines([{"pattern": text, "lemma": "capital", "tense": "present"} for text in patterns]),
            )
            archive.writestr(f"pararel-main/data/trex_lms_vocab/{name}.jsonl", lines(facts))
        archive.writestr("pararel-main/data/pattern_data/graphs_json/P31.jsonl", b"")
        archive.writestr("pararel-main/data/trex_lms_vocab/notes.txt", b"no rows")
    return path


def test_pararel(tmp_path):
    archive = {"archive": pararel_archive(tmp_path / "a.zip")}
    (tmp_path / "pararel").mkdir()
    assert converters.pararel_patterns(archive, tmp_path / "pararel/patterns.jsonl.xz") == 1
    assert converters.pararel_facts(archive, tmp_path / "pararel/facts.jsonl.xz") == 8
    assert len(pararel_claims(tmp_path)) == 8
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as empty:
        empty.writestr("README", b"")
    with pytest.raises(converters.ConversionError, match="no folder"):
        converters.pararel_facts({"archive": tmp_path / "b.zip"}, tmp_path / "out")


def question_archive(path, relations, split="train"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in relations.items():
            archive.writestr(f"EntityQuestions-c/dataset/{split}/{name}.{split}.json", json.dumps(rows, indent=4))
        archive.writestr(f"EntityQuestions-c/dataset/{split}/{name}.{split}.jsonl", b"an older form")
        archive.writestr(f"EntityQuestions-c/dataset/one-off/similar/P9/P9_similar.{split}.json", "[]")
    return {"archive": path}


@pytest.mark.parametrize("split", ["train", "dev"])
def test_entity_questions(tmp_path, split):
    subjects = ["Ada Ode", "Bo", "Élan?", "who", "born"]
    forms = {"P40": "Who is [X]'s child?", "P19": "Where was [X] born?", "P1": "[X]"}
    relations = {
        name: [{"question": form.replace("[X]", subject), "answers": [subject[:1], "b"]} for subject in subjects]
        for name, form in forms.items()
    }
    convert = converters.CONVERTERS[f"entity_questions_to_{'train' if split == 'train' else 'evaluate'}"]
    out = tmp_path / "out.jsonl.xz"
    assert convert(question_archive(tmp_path / "a.zip", relations, split), out) == 15
    assert read(out) == [
        {"relation": name, "question": row["question"], "subject": subject, "answers": row["answers"]}
        for name in sorted(relations)
        for subject, row in zip(subjects, relations[name], strict=True)
    ]
    assert len(load_facts(out)) == 15


@pytest.mark.parametrize("rows", [["Who is X?"], ["Who is X?", "Who is X?"], ["Who is ?", "Who is X?"]])
def test_a_question_of_entity_questions_without_a_subject(tmp_path, rows):
    relations = {"P26": [{"question": question, "answers": ["a"]} for question in rows]}
    with pytest.raises(converters.ConversionError, match=re.escape(f"P26: '{rows[0]}' names no subject")):
        converters.entity_questions(question_archive(tmp_path / "a.zip", relations), tmp_path / "out", "train")
    with pytest.raises(converters.ConversionError, match="no folder dataset/dev"):
        converters.entity_questions(question_archive(tmp_path / "a.zip", relations), tmp_path / "out", "dev")


@pytest.mark.skipif(not os.environ.get("MALMEN_DATA"), reason="MALMEN_DATA names no folder of real data")
@pytest.mark.parametrize("split", ["train", "dev"])
def test_entity_questions_become_the_small_tiers_file(tmp_path, split):
    expected = Path(os.environ["MALMEN_DATA"]) / f"entity_questions/{split}.jsonl.xz"
    relations = {}
    for row in read(expected):
        relations.setdefault(row["relation"], []).append({name: row[name] for name in ("question", "answers")})
    rows = converters.entity_questions(question_archive(tmp_path / "a.zip", relations, split), tmp_path / "out", split)
    assert rows == sum(map(len, relations.values())) and read(tmp_path / "out") == read(expected)
    (item,) = the_manifest()["data_sets"]["entity_questions"]["sources"].values()
    assert {made_["file"]: made_["rows"] for made_ in item["becomes"]}[f"entity_questions/{split}.jsonl.xz"] == rows


def test_rows_of_the_hub():
    row = {"id": "1", "input": "A.", "meta": {"x": ""}, "output": [{"answer": ""}, {"answer": "REFUTES", "meta": {}}]}
    assert converters.from_hub(row) == {"id": "1", "input": "A.", "output": [{"answer": "REFUTES"}]}
    assert converters.from_hub(NQ[0]) == NQ[0]


# --- fetching ---------------------------------------------------------------------------------------------------------


def entry(file, address, rows=None, **other):
    return {"file": file, "address": address, "revision": None, "sha256": None, "bytes": None, "rows": rows} | other


def source(downloads_, becomes, **other):
    return {"what": "some rows", "downloads": downloads_, "becomes": becomes} | other


def made(file, rows, converter="as_published", **roles):
    return {"file": file, "split": "train", "converter": converter, "from": roles, "rows": rows}


@pytest.fixture
def manifest(server):
    server.files |= {"/nq": lines(NQ), "/mend": lines(MEND), "/fever2": lines(FEVER2), "/kilt": lines(KILT)}

    def data_set(**sources_):
        return {"what": "a set", "used_for": "Fig. 5", "licence": "CC0", "home": "", "sources": sources_}

    claims = [entry("kilt.jsonl", f"{server.address}/kilt", 40)]
    mend = [entry("mend.jsonl", f"{server.address}/mend", [39, 40])]
    roles = {"facts": "mend.jsonl", "unrelated": "fever2/dev.jsonl.xz"}
    paired = made("fever/train.jsonl.xz", None, "with_claims_to_train", **roles)
    return {
        "data_sets": {
            "fever": data_set(
                mend=source(mend, [paired], needs=["fever2"]),
                kilt=source(claims, [made("fever/train.jsonl.xz", 40, "kilt_claims", claims="kilt.jsonl")]),
            ),
            "fever2": data_set(
                site=source(
                    [entry("f2.jsonl", f"{server.address}/fever2", 30)],
                    [made("fever2/dev.jsonl.xz", 20, "verified_claims", claims="f2.jsonl")],
                )
            ),
            "nq": data_set(
                github=source(
                    [entry("nq.jsonl", f"{server.address}/nq", 40)], [made("nq/train.jsonl.xz", 40, facts="nq.jsonl")]
                )
            ),
        }
    }


def test_everything_is_fetched_prepared_and_recorded(server, manifest, tmp_path, capsys):
    assert fetch.run([], tmp_path, manifest=manifest) == 0
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    prepared = {"fever/train.jsonl.xz", "fever2/dev.jsonl.xz", "nq/train.jsonl.xz"}
    kept = {"downloads/fever-mend/mend.jsonl", "downloads/fever2-site/f2.jsonl", "downloads/nq-github/nq.jsonl"}
    assert files == prepared | kept | {"fetched.json"}
    assert len(load_facts(tmp_path / "fever/train.jsonl.xz")) == 40
    record = json.loads((tmp_path / "fetched.json").read_text())
    assert {f"downloads/{name}" for name in record["downloads"]} == kept and set(record["prepared"]) == prepared
    nq = record["downloads"]["nq-github/nq.jsonl"]
    assert nq["rows"] == 40 and nq["sha256"] == downloads.sha256(tmp_path / "downloads/nq-github/nq.jsonl")
    assert nq["address"] == f"{server.address}/nq" and re.fullmatch(r"\d{4}-\d\d-\d\d", nq["date"])
    assert "licence: CC0" in capsys.readouterr().out
    assert fetch.check(tmp_path, manifest) == 0


def test_a_second_run_fetches_and_makes_nothing(server, manifest, tmp_path, capsys):
    fetch.run([], tmp_path, manifest=manifest)
    asked, record = len(server.asked), (tmp_path / "fetched.json").read_bytes()
    capsys.readouterr()
    assert fetch.run([], tmp_path, manifest=manifest) == 0
    assert len(server.asked) == asked and (tmp_path / "fetched.json").read_bytes() == record
    assert capsys.readouterr().out.count("as it was") == 3


def test_what_is_needed_comes_first(manifest):
    assert fetch.chosen([], manifest) == [("fever2", "site"), ("fever", "mend"), ("nq", "github")]
    assert fetch.chosen(["fever"], manifest) == [("fever2", "site"), ("fever", "mend")]
    assert fetch.chosen(["fever=kilt"], manifest) == [("fever", "kilt")]


@pytest.mark.parametrize(
    ("name", "said"), [("zsra", "there are: fever, fever2, nq"), ("fever=x", "it has: mend, kilt")]
)
def test_unknown_names(manifest, name, said):
    with pytest.raises(FetchError, match=said):
        fetch.chosen([name], manifest)


def test_later_downloads_must_have_the_hash_of_the_first(server, manifest, tmp_path, capsys):
    fetch.run(["nq"], tmp_path, manifest=manifest)
    first = (tmp_path / "nq/train.jsonl.xz").read_bytes()
    (tmp_path / "downloads/nq-github/nq.jsonl").unlink()
    server.files["/nq"] = lines(NQ[::-1])
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 1
    error = capsys.readouterr().err
    assert "sha256: expected" in error and "--trust nq.jsonl" in error
    assert (tmp_path / "downloads/nq-github/nq.jsonl.refused").exists()
    assert (tmp_path / "nq/train.jsonl.xz").read_bytes() == first
    assert fetch.run(["nq"], tmp_path, trust=["nq.jsonl"], manifest=manifest) == 0
    assert read(tmp_path / "nq/train.jsonl.xz") == NQ[::-1]
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 0  # the trusted hash is the recorded one now


def test_an_archive_that_is_packed_anew_is_no_fault(server, manifest, tmp_path):
    manifest["data_sets"]["nq"]["sources"]["github"]["downloads"][0]["changes"] = "it is packed anew"
    fetch.run(["nq"], tmp_path, manifest=manifest)
    (tmp_path / "downloads/nq-github/nq.jsonl").unlink()
    server.files["/nq"] = lines(NQ[::-1])
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 0


def test_a_damaged_download_is_fetched_again(server, manifest, tmp_path):
    fetch.run(["nq"], tmp_path, manifest=manifest)
    (tmp_path / "downloads/nq-github/nq.jsonl").write_bytes(lines(NQ)[:-30])
    assert fetch.check(tmp_path, manifest) == 1
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 0 and fetch.check(tmp_path, manifest) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 39}, "rows: expected 39, found 40"),
        ({"sha256": HASH}, f"sha256: expected {HASH}"),
        ({"bytes": 1}, "bytes: expected 1"),
    ],
)
def test_refused_downloads(manifest, tmp_path, capsys, changes, said):
    manifest["data_sets"]["nq"]["sources"]["github"]["downloads"][0] |= changes
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "nq").exists()
    assert fetch.run(["nq"], tmp_path, trust=["nq.jsonl"], manifest=manifest) == 0
    if "rows" in changes:  # what was trusted once stays so
        assert fetch.run(["nq"], tmp_path, manifest=manifest) == 0


def test_prepared_rows_are_counted(manifest, tmp_path, capsys):
    manifest["data_sets"]["nq"]["sources"]["github"]["becomes"][0]["rows"] = 41
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 1
    assert "expected 41 rows, made 40" in capsys.readouterr().err and not (tmp_path / "nq").exists()


def test_rows_of_another_form_are_refused(server, manifest, tmp_path, capsys):
    server.files["/nq"] = lines([{"text": "no question"}] * 40)
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 1
    assert "cannot be made of nq.jsonl" in capsys.readouterr().err


def test_one_failure_does_not_keep_the_others_from_coming(server, manifest, tmp_path, capsys):
    del server.files["/fever2"], server.files["/mend"]
    assert fetch.run([], tmp_path, manifest=manifest) == 2
    said = capsys.readouterr().err
    assert "fever2" in said and "404" in said and "Other sources: fever=kilt." in said
    assert (tmp_path / "nq/train.jsonl.xz").exists()


def test_without_a_network_it_ends_at_once(manifest, dead, tmp_path, capsys):
    for data_set in manifest["data_sets"].values():
        for item in data_set["sources"].values():
            item["downloads"][0]["address"] = f"{dead}/x"
    start = time.monotonic()
    assert fetch.run([], tmp_path, manifest=manifest) == 1
    assert time.monotonic() - start < 5 and capsys.readouterr().err.count("cannot be reached") == 1


def test_files_by_hand(manifest, dead, tmp_path, capsys):
    hand = tmp_path / "hand"
    (hand / "deep").mkdir(parents=True)
    (hand / "deep/f2.jsonl").write_bytes(lines(FEVER2))
    with zipfile.ZipFile(hand / "fever.zip", "w") as archive:
        archive.writestr("fever/mend.jsonl", lines(MEND))
    for data_set in manifest["data_sets"].values():
        for item in data_set["sources"].values():
            item["downloads"][0]["address"] = f"{dead}/x"
    assert fetch.run(["fever"], tmp_path / "to", by_hand=hand, manifest=manifest) == 0
    record = json.loads((tmp_path / "to/fetched.json").read_text())
    assert {found["address"] for found in record["downloads"].values()} == {"by hand"}
    assert fetch.run(["nq"], tmp_path / "to", by_hand=hand, manifest=manifest) == 1
    assert "hand holds no nq.jsonl" in capsys.readouterr().err


def test_drive(drive, manifest, tmp_path):
    item = manifest["data_sets"]["nq"]["sources"]["github"]["downloads"][0]
    del item["address"]
    item |= {"drive_folder": "top", "file": "zsre_train.json"}
    manifest["data_sets"]["nq"]["sources"]["github"]["becomes"][0]["from"] = {"facts": "zsre_train.json"}
    drive.files["/file/f_1"] = json.dumps(NQ).encode()
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 0
    drive.files["/file/f_1"] = b"<!DOCTYPE html><p>Quota exceeded"
    (tmp_path / "downloads/nq-github/zsre_train.json").unlink()
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 1


def test_the_hub(server, manifest, tmp_path, monkeypatch, capsys):
    import datasets

    item = manifest["data_sets"]["nq"]["sources"]["github"]["downloads"][0]
    del item["address"]
    item |= {"hub": {"name": "some/nq", "config": "open", "split": "train"}, "revision": "abc"}
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        return NQ

    monkeypatch.setattr(fetch, "HUB", f"{server.address}/nq")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 0 and asked == [("some/nq", "open", "train", "abc")]

    def fails(*arguments, **options):
        raise RuntimeError("no such revision\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    assert fetch.run(["nq"], tmp_path / "two", manifest=manifest) == 1
    assert "doesn't give some/nq (open, train, revision abc): no such revision" in capsys.readouterr().err


def test_an_unreachable_hub(manifest, dead, tmp_path, monkeypatch, capsys):
    item = manifest["data_sets"]["nq"]["sources"]["github"]["downloads"][0]
    del item["address"]
    item["hub"] = {"name": "some/nq", "config": "open", "split": "train"}
    monkeypatch.setattr(fetch, "HUB", dead)
    assert fetch.run(["nq"], tmp_path, manifest=manifest) == 1
    assert "cannot be reached" in capsys.readouterr().err


# --- checking ---------------------------------------------------------------------------------------------------------


def test_check_names_what_is_wrong(manifest, tmp_path, capsys):
    fetch.run(["nq", "fever2"], tmp_path, manifest=manifest)
    (tmp_path / "nq/train.jsonl.xz").unlink()
    path = tmp_path / "fever2/dev.jsonl.xz"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(bytes(content))
    (tmp_path / "downloads/nq-github/nq.jsonl").write_bytes(b"short")
    (tmp_path / "downloads/x.part").write_bytes(b"")
    (tmp_path / "downloads/y.refused").write_bytes(b"")
    capsys.readouterr()
    assert fetch.check(tmp_path, manifest) == 3
    said = capsys.readouterr().out
    for part in (
        "nq/train.jsonl.xz: missing",
        "fever2/dev.jsonl.xz: has another content",
        "nq.jsonl: has 5 bytes, not",
        "downloads/x.part: not complete",
        "downloads/y.refused: was refused",
        "3 problems; not prepared: fever",
    ):
        assert part in said


def test_a_folder_into_which_nothing_was_fetched(tmp_path):
    with pytest.raises(FetchError, match="nothing was fetched into it"):
        fetch.check(tmp_path)


def archive(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)


def test_files_by_hand_come_from_whole_archives_and_stay_in_their_place(tmp_path, monkeypatch):
    hand, target = tmp_path / "hand", tmp_path / "to" / "x.json"
    hand.mkdir()
    target.parent.mkdir()
    archive(hand / "b.zip", ("../../x.json", b"rows"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(hand / "a.zip")  # opening it would wait for ever
    assert fetch.copied(hand, "x.json", target) and target.read_bytes() == b"rows"
    assert [path.name for path in target.parent.iterdir()] == ["x.json"] and not (tmp_path / "x.json").exists()
    monkeypatch.setattr(downloads, "MOST", 3)
    with pytest.raises(FetchError, match="4 bytes: more than are taken"):
        fetch.copied(hand, "x.json", target)
    data = bytearray((hand / "b.zip").read_bytes())
    data[data.index(b"x.json") + 6] ^= 255  # in what was packed
    (hand / "b.zip").write_bytes(data)
    monkeypatch.undo()
    with pytest.raises(FetchError, match="cannot be taken from .*unpack it by hand"):
        fetch.copied(hand, "x.json", target)
    assert target.read_bytes() == b"rows"


def test_an_archive_with_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    archive(tmp_path / "a.zip", ("r/dataset/dev/P19.test.json", json.dumps(NQ)))
    monkeypatch.setattr(converters, "MEMBER", 100)
    with pytest.raises(converters.ConversionError, match="at most 100 are read"):
        converters.entity_questions({"a": tmp_path / "a.zip"}, tmp_path / "out", "dev")


DAMAGED = ["{", "[]", "\udcff", "[" * 10**5]
DAMAGED += ['{"downloads": 3}', '{"prepared": {"a": 1}}', '{"downloads": {"a": {"bytes": 1}}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record(tmp_path, manifest, content):
    (tmp_path / "fetched.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FetchError, match=r"fetched\.json.*to begin anew"):
        fetch.run(["nq"], tmp_path, manifest=manifest)


# --- the command line, and the manifest itself ------------------------------------------------------------------------


def test_command_line(tmp_path, capsys, monkeypatch, dead):
    assert fetch.main(["--list"]) == 0
    listed = capsys.readouterr().out
    stated = "fever_train.json (104,966 or 104,996 rows), fever_eval.json (10,444 rows)"
    assert "fever=mend" in listed and stated in listed
    assert "pararel-main.zip\n" in listed and "None" not in listed
    assert fetch.main(["--check", str(tmp_path)]) == 1
    assert fetch.main(["nowhere", "--to", str(tmp_path)]) == 1
    assert "there is no data set 'nowhere'" in capsys.readouterr().err
    assert fetch.main(["nq", "--to", str(tmp_path), "--from", str(tmp_path / "none")]) == 1
    assert "is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        fetch.main(["nq"])
    assert caught.value.code == 2 and "--to DIR" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "run", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert fetch.main(["nq", "--to", str(tmp_path)]) == 1
    assert "it continues" in capsys.readouterr().err


def the_manifest():
    return json.loads((ROOT / "data_scripts" / "manifest.json").read_text(encoding="utf-8"))


def all_sources():
    sets = the_manifest()["data_sets"]
    return [(f"{name}={key}", item) for name in sets for key, item in sets[name]["sources"].items()]


def test_every_set_of_the_paper_tier_is_there():
    names = {"zsre", "zsre_subjects", "fever", "fever2", "nq", "counterfact", "corpus"}
    assert names <= set(the_manifest()["data_sets"])
    for data_set in the_manifest()["data_sets"].values():
        assert all(data_set[name] for name in ("what", "used_for", "licence", "home", "sources"))


@pytest.mark.parametrize(("name", "item"), all_sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_manifest(name, item):
    prepared = {made["file"] for _, other in all_sources() for made in other["becomes"]}
    files = {download["file"] for download in item["downloads"]}
    for download in item["downloads"]:
        assert sum(key in download for key in ("address", "drive_folder", "hub")) == 1
        assert download["sha256"] is None or re.fullmatch(r"[0-9a-f]{64}", download["sha256"])
        assert {"revision", "bytes", "rows"} <= set(download) and download["rows_from"] and download["checked"]
        assert (download["sha256"] is None) == ("sha256_from" not in download) == (download["bytes"] is None)
        assert download.get("address", "https://").startswith("https://")
        if "raw.githubusercontent.com" in download.get("address", ""):
            assert re.fullmatch(r"[0-9a-f]{40}", download["revision"]) and download["revision"] in download["address"]
    for made_ in item["becomes"]:
        assert made_["converter"] in converters.CONVERTERS and made_["split"] and "rows" in made_
        for source_ in made_["from"].values():
            assert source_ in files or (source_ in prepared and source_.split("/")[0] in item["needs"])
    assert "needs" not in item or set(item["needs"]) <= set(the_manifest()["data_sets"])


def test_hashes_are_known_but_where_nobody_published_one():
    downloads_ = [entry for _, item in all_sources() for entry in item["downloads"] if "address" in entry]
    unknown = {entry["file"] for entry in downloads_ if entry["sha256"] is None}
    packed = {"pararel-main.zip", "EntityQuestions-096c261f327431b30af7ff718670f4bd13214908.zip"}
    assert unknown == {"zsre_mend_eval.json", *packed}
    assert all("changes" in entry for entry in downloads_ if entry["file"] in packed)
    hashes = {}
    for entry in downloads_:  # the same address, in two sources: the same file
        assert hashes.setdefault(entry["address"], entry["sha256"]) == entry["sha256"]
    assert len(set(hashes.values()) - {None}) == len(hashes) - len(unknown)


def test_fever_of_kilt_gives_the_claims_of_the_small_tier(tmp_path):
    (tmp_path / "fever").mkdir()
    for split in ("train", "dev"):
        converters.kilt_claims(sources(tmp_path, claims=KILT), tmp_path / f"fever/{split}.jsonl.xz")
        assert len(fever_claims(tmp_path, split)) == 40


@pytest.mark.skipif(not os.environ.get("MALMEN_DATA"), reason="MALMEN_DATA names no folder of real data")
@pytest.mark.parametrize("name", ["counterfact/full_form_804", "nq/dev", "zsre/mend_eval_1037", "fever/dev"])
def test_real_rows_survive_conversion(tmp_path, name):
    published = Path(os.environ["MALMEN_DATA"]) / f"{name}.jsonl.xz"
    plain, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl.xz"
    plain.write_bytes(lzma.decompress(published.read_bytes()))
    assert converters.as_published({"facts": plain}, out) == downloads.count_rows(plain)
    assert load_facts(out) == load_facts(published)


def test_the_readme_names_every_set_and_source():
    text = (ROOT / "data_scripts" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in the_manifest()["data_sets"])
    for _, item in all_sources():
        assert all(made_["file"] in text for made_ in item["becomes"])
