"""TruthfulQA's multiple choice: the scores by hand, log-probabilities token by token, and the published file."""

import math
from pathlib import Path

import pytest
import torch

from sae.errors import InputError
from sae.model.language_model import NonFiniteLogits
from steering.directions.iti import fit_iti
from steering.studies.truthfulqa import Question, answer_log_probs, labelled_texts, mc1, mc2, read_truthfulqa, truthfulqa
from steering.vector import SteeringVector

PROMPT = "Q: Is it so?\nA:"
ANSWERS = ["Yes.", "No, it is not.", "Maybe so."]
HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "questions.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def vector(width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def test_mc1_and_mc2_by_hand():
    half, quarter, eighth = math.log(0.5), math.log(0.25), math.log(0.125)
    assert mc1(half, [quarter, eighth]) == 1
    assert mc1(quarter, [eighth, half]) == 0
    assert mc1(quarter, [eighth, quarter]) == 0  # a tie is a miss
    assert mc2([half, eighth], [quarter]) == pytest.approx(0.625 / 0.875)
    assert mc2([eighth], [half, quarter, eighth]) == pytest.approx(0.125)
    assert mc2([half - 1000, quarter - 1000], [quarter - 1000]) == pytest.approx(0.75)  # e^-1000 is no float


def by_hand(lm, prompt: str, answer: str, edit=None) -> float:
    """log p of each of the answer's tokens, one forward pass for each."""
    prompt_ids = [0, *lm.tokenizer(prompt)["input_ids"]]
    ids = prompt_ids + lm.tokenizer(" " + answer)["input_ids"]
    total = 0.0
    for p in range(len(prompt_ids), len(ids)):
        handle = None
        if edit is not None:
            handle = lm.model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: (edit(args[0], len(prompt_ids) - 1),))
        with torch.no_grad():
            logits_v = lm.model(torch.tensor([ids[:p]])).logits[0, -1].double()
        if handle is not None:
            handle.remove()
        total += float(logits_v.log_softmax(-1)[ids[p]])
    return total


def test_answers_of_different_length_are_scored_token_by_token(byte_lm):
    assert answer_log_probs(byte_lm, PROMPT, ANSWERS) == pytest.approx([by_hand(byte_lm, PROMPT, a) for a in ANSWERS], rel=1e-4)
    assert answer_log_probs(byte_lm, PROMPT, ANSWERS[1:2]) == pytest.approx([by_hand(byte_lm, PROMPT, ANSWERS[1])], rel=1e-4)


def test_vectors_are_added_where_the_answers_are_predicted_and_not_before(byte_lm):
    direction_d = vector()

    def edit(z_spx, first):
        z_spx = z_spx.clone()
        z_spx[:, first:] += 2 * direction_d
        return z_spx

    scores = answer_log_probs(byte_lm, PROMPT, ANSWERS, [(SteeringVector.at("head_out.1", direction_d), 2.0)])
    assert scores == pytest.approx([by_hand(byte_lm, PROMPT, a, edit) for a in ANSWERS], rel=1e-4)
    assert scores != pytest.approx(answer_log_probs(byte_lm, PROMPT, ANSWERS), rel=1e-2)


def test_a_question_is_scored_from_its_answers(byte_lm):
    questions = [
        Question("Is it so?", "Yes.", ("Yes.", "It is."), ("No.", "Never ever.")),
        Question("Who?", "Nobody knows.", ("Nobody knows.",), ("I.",)),
    ]
    for primer in ("", "Q: Why?\nA: Because.\n\n"):
        for question, score in zip(questions, truthfulqa(byte_lm, questions, primer=primer), strict=True):
            p = {a: math.exp(by_hand(byte_lm, primer + question.prompt, a)) for a in (*question.correct, *question.incorrect)}
            right, wrong = (sum(p[a] for a in answers) for answers in (question.correct, question.incorrect))
            assert score.mc1 == (p[question.best] > max(p[a] for a in question.incorrect))
            assert score.mc2 == pytest.approx(right / (right + wrong), rel=1e-3)


def test_reading_and_labelling(tmp_path):
    path = write(tmp_path, HEADER + 'A,B,Is it so? ,Yes,"Yes; It is.; ",No; Never ,http\nA,B,"Who, then?",Me.,Me.,You,http\n')
    questions = read_truthfulqa(path)
    assert questions == [
        Question("Is it so?", "Yes.", ("Yes.", "It is."), ("No.", "Never.")),
        Question("Who, then?", "Me.", ("Me.",), ("You.",)),
    ]
    texts, labels, groups = labelled_texts(questions)
    assert texts[:3] == ["Q: Is it so?\nA: Yes.", "Q: Is it so?\nA: It is.", "Q: Is it so?\nA: No."]
    assert (labels, groups) == ([1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1])


def test_unusable_files_and_answers(byte_lm, tmp_path):
    for text, sentence in [
        (HEADER, "found none"),
        ("Question,Best Answer\na,b\n", "Question, Best Answer"),
        (HEADER + "A,B,Who?,Me,Me,;,http\n", "an incorrect answer in row 1"),
        (HEADER + "A,B,Who?,Me,Me\n", "an incorrect answer in row 1"),
    ]:
        with pytest.raises(InputError, match=sentence):
            read_truthfulqa(write(tmp_path, text))
    with pytest.raises(InputError, match="cannot be read"):
        read_truthfulqa(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="answers to score"):
        answer_log_probs(byte_lm, PROMPT, [])
    with pytest.raises(InputError, match="at most 512 positions"):
        answer_log_probs(byte_lm, PROMPT, ["x" * 600])


def test_scores_that_are_no_numbers_are_not_given(byte_lm):
    with pytest.raises((NonFiniteLogits, OverflowError)):
        answer_log_probs(byte_lm, PROMPT, ANSWERS, [(SteeringVector.at("resid_post.2", vector()), 1e38)])


def test_published_file_with_and_without_an_intervention(byte_lm, shared):
    path = shared / "eval" / "truthfulqa.csv"
    if not path.is_file():
        pytest.skip("no truthfulqa.csv in the shared folder")
    questions = read_truthfulqa(path)
    assert len(questions) == 817
    assert questions[0].best == "The watermelon seeds pass through your digestive system."
    assert len(questions[0].correct) == 6
    assert all(question.best in question.correct for question in questions)
    texts, labels, groups = labelled_texts(questions[:12])
    made = fit_iti(byte_lm, texts, labels, groups=groups, heads=4)
    plain, changed = (truthfulqa(byte_lm, questions[20:26], vectors) for vectors in ([], [(made, 15.0)]))
    assert plain != changed
    assert truthfulqa(byte_lm, questions[20:26], [(made, 0.0)]) == plain
    for score in plain + changed:
        assert score.mc1 in (0, 1)
        assert 0 <= score.mc2 <= 1
