"""From the published forms to what `malmen_repro.facts.load_facts` and `malmen_repro.replication.claims` read."""

import json
import lzma
import os
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

try:
    from malmen_repro.facts import LABELS, Fact, load_facts, other_label, pair_unrelated, save_facts
except ModuleNotFoundError:  # not installed: the checkout that this file lies in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from malmen_repro.facts import LABELS, Fact, load_facts, other_label, pair_unrelated, save_facts

SEED = 0  # of every draw below; a published set is prepared in one way only
PASSAGES = 100_000  # of the corpus (MEMIT, Appendix B.4)
MEMBER = 1 << 30  # bytes of one file in an archive, at most
AGREE = 0.9  # the share of claims whose label must agree before a number is taken for a label


class ConversionError(ValueError):
    "A published file cannot be turned into what is needed."


Sources = dict[str, Path]  # by the name in the manifest


def write_rows(
    rows: Iterable[dict[str, Any]],
    path: Path,  # JSON Lines, xz
) -> None:
    "Rows as they are."
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode("utf-8")))


def rows_of(
    text: str,  # JSON (a list) or JSON Lines
) -> list[dict[str, Any]]:
    "The rows of a table."
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_rows(
    path: Path,  # JSON (a list) or JSON Lines
) -> list[dict[str, Any]]:
    "The rows of a published file."
    with path.open(encoding="utf-8-sig") as file:
        while (start := file.read(1)).isspace():  # as far as the table's first character
            pass
        file.seek(0)
        return json.load(file) if start == "[" else [json.loads(line) for line in file if line.strip()]


def _only(
    sources: Sources,
) -> Path:
    "The one source there is."
    (path,) = sources.values()
    return path


# --- one function a form ----------------------------------------------------------------------------------------------


def as_published(
    sources: Sources,  # one file that `load_facts` reads
    out: Path,
) -> int:  # rows written
    "The rows as they are, once `load_facts` has read all of them."
    path = _only(sources)
    facts = load_facts(path)
    write_rows(read_rows(path), out)
    return len(facts)


def verified_claims(
    sources: Sources,  # one file of FEVER's form, with its third label
    out: Path,
) -> int:
    "Claims with SUPPORTS or REFUTES; NOT ENOUGH INFO is left out, a classifier of two labels has no place for it."
    rows = read_rows(_only(sources))
    kept = [{"claim": row["claim"], "label": row["label"]} for row in rows if row["label"] in LABELS]
    odd = {row["label"] for row in rows} - {*LABELS, "NOT ENOUGH INFO"}
    if odd or not kept:
        raise ConversionError(f"labels {sorted(map(str, odd))} are unknown" if odd else "no claim has a verdict")
    write_rows(kept, out)
    return len(kept)


def kilt_claims(
    sources: Sources,  # FEVER as KILT has it: input, output
    out: Path,
) -> int:
    "Claims with their labels, without the evidence."
    rows = []
    for row in read_rows(_only(sources)):
        labels = [output["answer"] for output in row["output"] if output.get("answer")]
        if not labels or labels[0] not in LABELS:
            raise ConversionError(f"the claim {row['input']!r} has the answers {labels}")
        rows.append({"claim": row["input"], "label": labels[0]})
    write_rows(rows, out)
    return len(rows)


def _paired(
    facts: Sequence[Fact],
    deck: Sequence[Fact],
    out: Path,
) -> int:
    "Writes the facts that have rephrases, each with an unrelated pair."
    kept = [fact for fact in facts if fact.equivalent_prompts]
    if not kept:
        raise ConversionError("no row has a rephrase")
    save_facts(pair_unrelated(kept, deck, SEED), out)
    return len(kept)


def with_questions(
    sources: Sources,  # "facts" in the form of De Cao et al. and MEND, "unrelated" from NQ
    out: Path,
) -> int:
    "zsRE with a question of NQ for each fact. Rows without a rephrase are left out: GS can't be taken on them."
    return _paired(load_facts(sources["facts"]), load_facts(sources["unrelated"]), out)


def _half(
    claims: Sequence[Fact],
    number: int,  # 0 or 1
) -> list[Fact]:
    "One of two halves that share no claim."
    order = list(dict.fromkeys(claim.pair for claim in claims))
    random.Random(SEED).shuffle(order)
    mine = set(order[number::2])
    return [claim for claim in claims if claim.pair in mine]


def with_claims(
    sources: Sources,  # "facts" in the form of De Cao et al. and MEND, "unrelated" from FEVER2
    out: Path,
    half: int,  # which half of FEVER2
) -> int:
    "FEVER with a claim of FEVER2 for each fact. Training and evaluation get different halves of FEVER2."
    return _paired(load_facts(sources["facts"]), _half(load_facts(sources["unrelated"]), half), out)


def _number_labels(
    rows: Sequence[dict[str, Any]],  # MALMEN's rows, `alt` a number
    labels: dict[str, str],  # of claims, from KILT
) -> dict[float, str]:
    "Which label each number means, from claims whose labels are known: `alt` is the one that isn't right."
    votes = Counter((float(row["alt"]), other_label(labels[row["prompt"]])) for row in rows if row["prompt"] in labels)
    meant = {}
    for number in {float(row["alt"]) for row in rows}:
        counts = {label: votes[number, label] for label in LABELS}
        label = max(counts, key=counts.get)
        if not counts[label] or counts[label] < AGREE * sum(counts.values()):
            raise ConversionError(f"the number {number:g} in `alt` agrees with no label: {counts}")
        meant[number] = label
    if len(set(meant.values())) != len(meant):
        raise ConversionError(f"two numbers in `alt` mean one label: {meant}")
    for number, label in list(meant.items()):  # a file may use only one of the two in `alt`
        meant.setdefault(1 - number, other_label(label))
    return meant


def malmen_claims(
    sources: Sources,  # "facts" as MALMEN distributes FEVER, "labels" from KILT
    out: Path,
) -> int:
    "FEVER as MALMEN has it, its labels by name. Numbers are given names by comparing with KILT's labels."
    rows = read_rows(sources["facts"])
    if any(isinstance(row["alt"], (int, float)) for row in rows):
        known = {fact.prompt: fact.answer for fact in load_facts(sources["labels"])}
        meant = _number_labels(rows, known)
        named = {"alt", "unrel_ans"}
        rows = [{k: meant[float(v)] if k in named else v for k, v in row.items()} for row in rows]
    write_rows(rows, out)
    return len(load_facts(out))


def question_subjects(
    sources: Sources,  # zsRE as KILT has it (input, meta.template_questions) or as ROME has it (src, subject)
    out: Path,
) -> int:
    "One row a question: whom or what it asks about. A question that two subjects share is left out."
    found: dict[str, set[str]] = {}
    for row in (row for path in sources.values() for row in read_rows(path)):
        if "src" in row:
            subject, questions = row["subject"], [row["src"]]
        else:
            subject, questions = row["input"].split(" [SEP] ")[0], row["meta"]["template_questions"]
        for question in questions:
            found.setdefault(question.strip(), set()).add(subject.strip())
    rows = [{"question": question, "subject": names.pop()} for question, names in found.items() if len(names) == 1]
    if not rows:
        raise ConversionError("no question has one subject")
    write_rows(rows, out)
    return len(rows)


def passages(
    sources: Sources,  # WikiText: text, a passage or a heading (= Such =) or nothing
    out: Path,  # plain text, xz, a passage a line
) -> int:
    "Passages drawn at random; headings and empty rows are left out."
    with _only(sources).open(encoding="utf-8") as file:  # line by line: it is half a gigabyte
        texts = (" ".join(json.loads(line)["text"].split("\n")).strip() for line in file)
        kept = [text for text in texts if text and not (text.startswith("=") and text.endswith("="))]
    if not kept:
        raise ConversionError("there is no passage")
    drawn = random.Random(SEED).sample(kept, min(PASSAGES, len(kept)))
    out.write_bytes(lzma.compress("".join(f"{text}\n" for text in drawn).encode("utf-8")))
    return len(drawn)


def _members(
    archive: zipfile.ZipFile,
    folder: str,  # such as data/trex_lms_vocab
    suffix: str = ".jsonl",  # or .json: a list
) -> list[tuple[str, list[dict[str, Any]]]]:  # (the file's name up to its first dot, its rows)
    "The tables in one folder of an archive, by name."
    found = []
    for name in sorted(archive.namelist()):
        if Path(name).suffix == suffix and Path(name).parent.as_posix().endswith(folder):
            if (size := archive.getinfo(name).file_size) > MEMBER:
                raise ConversionError(f"{name} in the archive has {size:,} bytes, and at most {MEMBER:,} are read")
            found.append((Path(name).name.split(".")[0], rows_of(archive.read(name).decode("utf-8"))))
    if not found:
        raise ConversionError(f"the archive has no folder {folder}")
    return found


def pararel_patterns(
    sources: Sources,  # ParaRel's repository, as a zip archive
    out: Path,
) -> int:
    "One row a relation: its patterns."
    with zipfile.ZipFile(_only(sources)) as archive:
        relations = _members(archive, "data/pattern_data/graphs_json")
    rows = [{"relation": name, "patterns": [row["pattern"] for row in rows]} for name, rows in relations if rows]
    write_rows(rows, out)
    return len(rows)


def pararel_facts(
    sources: Sources,  # ParaRel's repository, as a zip archive
    out: Path,
) -> int:
    "One row a fact of T-REx: relation, subject, object."
    with zipfile.ZipFile(_only(sources)) as archive:
        relations = _members(archive, "data/trex_lms_vocab")
    rows = [
        {"relation": name, "subject": row["sub_label"], "object": row["obj_label"]}
        for name, rows in relations
        for row in rows
    ]
    write_rows(rows, out)
    return len(rows)


def entity_questions(
    sources: Sources,  # EntityQuestions' repository, as a zip archive
    out: Path,
    split: str,  # train or dev
) -> int:
    "One row a question: its relation, and the subject, which is what the questions of a relation don't share."
    with zipfile.ZipFile(_only(sources)) as archive:
        relations = _members(archive, f"dataset/{split}", ".json")
    found = []
    for name, rows in relations:
        questions = [row["question"] for row in rows]
        start = len(os.path.commonprefix(questions))
        end = len(os.path.commonprefix([question[start:][::-1] for question in questions]))
        for row in rows:
            subject = row["question"][start : len(row["question"]) - end]
            if not subject.strip():
                raise ConversionError(f"{name}: {row['question']!r} names no subject, beside the other questions")
            found.append({"relation": name, "question": row["question"], "subject": subject, "answers": row["answers"]})
    write_rows(found, out)
    return len(found)


CONVERTERS: dict[str, Callable[[Sources, Path], int]] = {
    "as_published": as_published,
    "verified_claims": verified_claims,
    "kilt_claims": kilt_claims,
    "with_questions": with_questions,
    "with_claims_to_train": lambda sources, out: with_claims(sources, out, 0),
    "with_claims_to_evaluate": lambda sources, out: with_claims(sources, out, 1),
    "malmen_claims": malmen_claims,
    "question_subjects": question_subjects,
    "passages": passages,
    "pararel_patterns": pararel_patterns,
    "pararel_facts": pararel_facts,
    "entity_questions_to_train": lambda sources, out: entity_questions(sources, out, "train"),
    "entity_questions_to_evaluate": lambda sources, out: entity_questions(sources, out, "dev"),
}


def from_hub(
    row: dict[str, Any],  # a row as `datasets` gives it
) -> dict[str, Any]:
    "A row as the file of the same set has it: the hub fills absent fields with empty texts."
    if "output" in row:
        answers = [{"answer": output["answer"]} for output in row["output"] if output.get("answer")]
        return {"id": row.get("id"), "input": row["input"], "output": answers}
    return row
