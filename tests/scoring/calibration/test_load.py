"""From the setting to batches: padding, domains, slices, determinism, cutting and skipping, packing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moeprune import console
from moeprune.errors import InputError, UsageError
from moeprune.scoring.calibration.batching import PACKS, can_pack, fill_rows, packed, unpacked
from moeprune.scoring.calibration.documents import Document
from moeprune.scoring.calibration.load import _packing_checked, load_calibration
from moeprune.scoring.calibration.presets import plan_for
from moeprune.settings import Settings
from tests import tiny
from tests.scoring import byte_tokenizer

CONFIG = transformers.Qwen3MoeConfig(vocab_size=300)


def data(tmp_path: Path, rows: list[dict]) -> str:
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, rows, config=CONFIG, **settings):
    chosen = Settings(calibration_path=data(tmp_path, rows), **settings)
    return load_calibration(chosen, byte_tokenizer.plain(("<s>", "</s>"), bos=True), config)


ROWS = [{"text": "x" * (i % 17 + 1) + str(i), "domain": "ab"[i % 2]} for i in range(60)]


def test_each_row_is_one_document_and_only_its_tokens_count(tmp_path):
    calibration = load(tmp_path, ROWS, batch_size=4)
    texts = []
    for batch in calibration.batches:
        ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert set(batch.inputs) == {"input_ids", "attention_mask"}
        assert (batch.domain_BT.dtype, batch.slice_BT.dtype) == (torch.int16, torch.int8)
        assert torch.equal(batch.domain_BT != -1, mask_BT.bool())
        assert torch.equal(batch.domain_BT < -1, (ids_BT == 0) & mask_BT.bool())  # begin of text
        assert torch.equal(mask_BT.sort(dim=1, descending=True).values, mask_BT)  # padding only on the right
        texts += [
            byte_tokenizer.plain(("<s>", "</s>"), bos=True).decode(ids[mask.bool()])
            for ids, mask in zip(ids_BT, mask_BT, strict=True)
        ]
    assert sorted(texts) == sorted("<s>" + row["text"] for row in ROWS)
    lengths = [batch.domain_BT.shape[1] for batch in calibration.batches]
    assert lengths == sorted(lengths, reverse=True)


def test_domains_and_slices_of_the_tokens(tmp_path):
    calibration = load(tmp_path, ROWS)
    assert calibration.domains == ("a", "b")
    tokenizer = byte_tokenizer.plain(("<s>", "</s>"), bos=True)
    per_slice = dict.fromkeys([(d, s) for d in (0, 1) for s in range(4)], 0)
    for batch in calibration.batches:
        for ids, domains, slices in zip(batch.inputs["input_ids"], batch.domain_BT, batch.slice_BT, strict=True):
            counted = domains >= 0
            number = int(tokenizer.decode(ids[counted]).strip("<s>").strip("x"))
            assert domains[counted].unique().tolist() == [number % 2]
            (slice_,) = slices[counted].unique().tolist()
            per_slice[number % 2, slice_] += 1
    assert max(per_slice.values()) - min(per_slice.values()) <= 1


def test_summary_counts_what_the_batches_hold(tmp_path):
    calibration = load(tmp_path, ROWS, max_samples=21)
    counted = sum(int((batch.domain_BT >= 0).sum()) for batch in calibration.batches)
    summary = calibration.summary
    assert summary["samples"] == 21
    assert summary["tokens"] == counted == sum(domain["tokens"] for domain in summary["domains"].values())
    assert [domain["samples"] for domain in summary["domains"].values()] == [11, 10]
    json.dumps(summary, allow_nan=False)


def test_the_same_seed_gives_the_same_tokens_wherever_the_file_lies(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first, second = load(tmp_path, ROWS, max_samples=20), load(tmp_path / "elsewhere", ROWS, max_samples=20)
    assert first.fingerprint == second.fingerprint
    # Fixed: another machine, another day and another version must make the same tokens.
    assert first.fingerprint == "289a757c29e83d6b051cbf6276ff67beb1b59ff3956f1fb058ab21a84e3534f4"
    assert load(tmp_path, ROWS, max_samples=20, seed=1).fingerprint != first.fingerprint


def test_the_tokens_do_not_hang_on_hashes_locale_or_clock(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.scoring.calibration.test_load import load, ROWS\n"
        "print(load(Path(sys.argv[1]), ROWS, max_samples=20).fingerprint)"
    )
    strange = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=os.environ | strange
    )
    assert done.stdout.strip() == load(tmp_path, ROWS, max_samples=20).fingerprint, done.stderr


def test_long_documents_are_cut_and_short_ones_skipped_and_both_are_counted(tmp_path):
    rows = [{"text": "y" * 100}, {"text": ""}, {"text": "fine"}]
    calibration = load(tmp_path, rows, max_seq_len=16)
    assert calibration.summary["cut_to_max_seq_len"] == 1
    assert calibration.summary["skipped"] == {"empty": 1}
    assert calibration.batches[0].domain_BT.shape == (2, 16)


def test_samples_of_one_token_are_skipped(tmp_path):
    tokenizer = byte_tokenizer.plain()
    path = data(tmp_path, [{"text": "z"}, {"text": "zz"}])
    calibration = load_calibration(Settings(calibration_path=path), tokenizer, CONFIG)
    assert calibration.summary["skipped"] == {"shorter than 2 tokens": 1}
    with pytest.raises(InputError, match="none of 1 calibration samples"):
        load_calibration(Settings(calibration_path=data(tmp_path, [{"text": "z"}])), tokenizer, CONFIG)


def test_chats_that_the_template_refuses_are_counted(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}] * 2}, {"messages": [{"role": "user", "content": "b"}]}]
    path = Settings(calibration_path=data(tmp_path, rows))
    calibration = load_calibration(path, byte_tokenizer.of_family("mixtral"), CONFIG)
    assert calibration.summary["skipped"] == {"refused by the chat template": 1}


@pytest.mark.parametrize("asked", [{}, {"special_tokens": "skip"}, {"special_tokens": "count"}])
def test_special_tokens_do_not_count_unless_asked(tmp_path, asked):
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    rows = [{"messages": chat, "domain": "a"}, {"text": "a longer text, to be a row with other padding", "domain": "b"}]
    tokenizer = byte_tokenizer.of_family("granite")
    calibration = load_calibration(Settings(calibration_path=data(tmp_path, rows), **asked), tokenizer, CONFIG)
    (batch,) = calibration.batches
    ids_BT, domain_BT = batch.inputs["input_ids"], batch.domain_BT
    special, text = (
        [f"<|{mark}|>" for mark in ("start_of_role", "end_of_role", "end_of_text")] * 2,
        "userab\nassistantcde\n",
    )
    whole = "".join(["{}user{}ab{}\n{}assistant{}cde{}\n".format(*special)])
    counts = asked.get("special_tokens") == "count"
    assert tokenizer.decode(ids_BT[domain_BT == 0]) == (whole if counts else text)
    assert tokenizer.decode(ids_BT[domain_BT == -2]) == ("" if counts else "".join(special))  # those of domain 0
    assert torch.equal(domain_BT == -1, batch.inputs["attention_mask"] == 0)  # and the rest is padding
    assert calibration.summary["tokens"] == int((domain_BT >= 0).sum())
    assert calibration.summary["special_tokens_left_out"] == (0 if counts else len(special))


def test_a_thinking_setting_that_changes_nothing_is_said(tmp_path):
    path = data(tmp_path, [{"prompt": "a", "answer": "b"}])
    for name, said in (("qwen3", False), ("chatml", True)):
        before = len(console.warnings())
        load_calibration(Settings(calibration_path=path, thinking="off"), byte_tokenizer.of_family(name), CONFIG)
        assert ("thinking=off changes nothing" in " ".join(console.warnings()[before:])) is said


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="the tokenizer is another model's"):
        load(tmp_path, ROWS, transformers.Qwen3MoeConfig(vocab_size=40))


def test_the_built_in_set_is_used_when_nothing_is_named():
    calibration = load_calibration(Settings(), byte_tokenizer.plain(("<s>", "</s>"), bos=True), CONFIG)
    assert calibration.summary["source"] == "built-in"
    assert calibration.summary["skipped"] == {}


# ------------------------------------------------------------------------------------------- documents stay apart


NUMBERS = [str(i) for i in range(500)]  # each document is its own domain, so that its tokens can be found


def documents(lengths: list[int], changed: int = -1) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(10, 200, (length,), generator=generator)
        made.append(Document(((ids * 7 + 3) % 190 + 10 if i == changed else ids).tolist(), domain=str(i), slice=0))
    return made


def logits_of(model, batches) -> dict[int, torch.Tensor]:
    """Document -> its tokens' logits. The domain is the number of the document here."""
    found = {}
    for batch in batches:
        with torch.no_grad():
            logits_BTV = model(**batch.inputs, use_cache=False).logits
        for number in batch.domain_BT[batch.domain_BT >= 0].unique().tolist():
            found[number] = logits_BTV[batch.domain_BT == number]
    return found


@pytest.fixture(scope="module", params=[*sorted(PACKS), "gpt_oss"])
def model(request):
    return tiny.build(request.param)


def modes(model, made):
    """The batches that this model may get. Rows of several documents, of several rows, and of one each."""
    batches = [unpacked(made, NUMBERS, 3, 0), unpacked(made, NUMBERS, 1, 0)]
    return batches + ([packed(fill_rows(made, 16), NUMBERS, 16, 2, 0)] if can_pack(model.config) else [])


def test_changing_one_document_moves_no_other(model):
    lengths = [5, 1, 9, 4, 7, 3]
    for changed in (0, 3):  # the first of a packed row: all behind could see it
        for first, second in zip(
            modes(model, documents(lengths)), modes(model, documents(lengths, changed)), strict=True
        ):
            before, after = logits_of(model, first), logits_of(model, second)
            # Not to the bit: experts sum their tokens in groups, and other tokens in the group round otherwise.
            moved = {n for n in before if not torch.allclose(before[n], after[n], rtol=1e-4, atol=1e-5)}
            assert moved == {changed}


def test_a_document_gets_the_same_logits_packed_padded_and_alone(model):
    made = documents([5, 9, 4, 7])
    alone = logits_of(model, [batch for document in made for batch in unpacked([document], NUMBERS, 1, 0)])
    for batches in modes(model, made):
        for number, logits_TV in logits_of(model, batches).items():
            torch.testing.assert_close(logits_TV, alone[number], rtol=1e-4, atol=1e-5)


def test_why_packing_is_not_for_every_model():
    """A finding, not a wish: should this fail, gpt-oss's mask now gets the positions; add it to PACKS then."""
    model = tiny.build("gpt_oss")
    before, after = (logits_of(model, packed([documents([5, 9], changed)], NUMBERS, 16, 1, 0)) for changed in (-1, 0))
    assert not torch.allclose(before[1], after[1], rtol=1e-2, atol=1e-2)


def test_packing_loses_and_cuts_nothing():
    lengths = [(i * 37) % 50 + 1 for i in range(500)]
    batches = packed(fill_rows(documents(lengths), 64), NUMBERS, 64, 8, 0)
    found = [batch.inputs["input_ids"][batch.domain_BT == i].tolist() for i in range(500) for batch in batches]
    assert [ids for ids in found if ids] == [document.ids for document in documents(lengths)]
    rows = sum(len(batch.domain_BT) for batch in batches)
    assert rows <= 1.05 * sum(lengths) / 64 + 1


def test_packed_sequences_are_counted_and_filled(tmp_path):
    rows = [{"text": "w" * (20 + i % 9)} for i in range(300)]
    calibration = load(tmp_path, rows, max_samples=10, max_seq_len=64, packing="on")
    assert sum(len(batch.domain_BT) for batch in calibration.batches) <= 10
    filled = sum(int((batch.domain_BT >= 0).sum()) for batch in calibration.batches)
    assert filled > 0.7 * 10 * 64


def test_packing_draws_more_documents_until_the_sequences_are_full(tmp_path):
    calibration = load(
        tmp_path, [{"text": f"{i % 10}"} for i in range(3000)], max_samples=10, max_seq_len=64, packing="on"
    )
    assert (calibration.summary["tokens"], calibration.summary["special_tokens_left_out"]) == (320, 320)
    assert calibration.summary["samples"] == 320


def test_packed_sequences_hold_all_sources_alike(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'"{name * 29}"\n' for _ in range(100)))
    spec = ",".join(f"{tmp_path}/{name}.jsonl" for name in "abc")
    settings = Settings(calibration_path=spec, max_samples=6, max_seq_len=60, packing="on")
    calibration = load_calibration(settings, byte_tokenizer.plain(("<s>", "</s>"), bos=True), CONFIG)
    assert [domain["samples"] for domain in calibration.summary["domains"].values()] == [4, 4, 4]


def test_packing_where_it_is_not_known_to_be_right(tmp_path):
    config = transformers.GptOssConfig(vocab_size=300)
    with pytest.raises(UsageError, match="not known to stay apart in gpt_oss"):
        load(tmp_path, ROWS, config, packing="on")
    plan = _packing_checked(plan_for(Settings(calibration_path="paper-code")), Settings(), config)
    assert (plan.packing, plan.max_seq_len) == (False, 2048)
    assert any("the preset runs unpacked" in line for line in console.warnings())
