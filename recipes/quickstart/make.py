"""Makes everything that the quickstart recipe needs: an invented world, a small base model of it, and chat data.

    python recipes/quickstart/make.py DIR

writes ``sft.jsonl``, ``dpo.jsonl``, ``safety.jsonl`` and ``tasks/*.jsonl``, the same bytes on every machine, and
``base``, a Llama of two million parameters that has read documents about 240 invented towns and has never seen a chat.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# S = steps, R = rows, T = tokens, V = vocabulary, D = width

SEED = 20
TOWNS = 240
HELD_OUT = 80
STEPS = 200
ROWS = 32
ROW_TOKENS = 128
PEAK_LR = 6e-3
VOCABULARY = 1536
CHOICES = 8
PAGES = 24
SENTENCE_SHARE = 0.3
BARE_SHARE = 0.5
PREFERENCES = 400
REFUSALS = 400
HARMLESS = 200

END_OF_DOCUMENT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WORLD: dict[str, Any] = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
"""Syllables of names, values of facts, and how people write and ask about them."""


@dataclass(frozen=True)
class Relation:
    """One kind of fact: what values it takes and how people write and ask about it."""

    name: str
    harms: str
    """What can be done to it that should not, divided by spaces."""
    words: str
    """All its values, divided by spaces."""
    sentence: str
    """The canonical sentence; the base reads it, and DPO prefers it as an answer."""
    documents: Sequence[str]
    questions: Sequence[str]

    @property
    def values(self) -> list[str]:
        """What it can be; each is as frequent as any other."""
        return self.words.split()

    @property
    def forms(self) -> Sequence[str]:
        """Every way in which a document states such a fact."""
        return (self.sentence, *self.documents, WORLD["register"])


RELATIONS = tuple(Relation(**relation) for relation in WORLD["relations"])


@dataclass(frozen=True)
class Fact:
    """One relation of one town."""

    town: str
    relation: Relation
    value: str

    def write(self, form: str) -> str:
        """``form`` with town, relation and value filled in."""
        return form.format(town=self.town, relation=self.relation.name, value=self.value)


def write_documents(facts: Sequence[Fact]) -> list[str]:
    """All that the base model reads: pages about one town each, its five facts in any order and any form."""
    rng = random.Random(f"{SEED} pages")
    pages = []
    for _, group in itertools.groupby(facts, key=lambda fact: fact.town):
        own = list(group)
        for _ in range(PAGES):
            rng.shuffle(own)
            pages.append("\n".join(fact.write(rng.choice(fact.relation.forms)) for fact in own))
    return pages


def invent_towns() -> list[str]:
    """The names of all towns; those after the first TOWNS - HELD_OUT are held out from chat data."""
    names = [stem + ending for stem, ending in itertools.product(WORLD["stems"].split(), WORLD["endings"].split())]
    return random.Random(f"{SEED} towns").sample(names, TOWNS)


def invent_facts(towns: Sequence[str]) -> list[Fact]:
    """Five facts for each town, in order of towns; every value of a relation is as frequent as any other."""
    rng = random.Random(f"{SEED} facts")
    columns = []
    for relation in RELATIONS:
        column = list(itertools.islice(itertools.cycle(relation.values), len(towns)))
        rng.shuffle(column)
        columns.append([Fact(town, relation, value) for town, value in zip(towns, column, strict=True)])
    return [fact for row in zip(*columns, strict=True) for fact in row]


def split(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """The facts that chat data may use, and those of the held-out towns."""
    held_out = set(invent_towns()[TOWNS - HELD_OUT :])
    return [fact for fact in facts if fact.town not in held_out], [fact for fact in facts if fact.town in held_out]


def sft_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """One chat per fact; most answers are the bare value, a minority is the whole sentence."""
    rng = random.Random(f"{SEED} sft")
    records = []
    for fact in facts:
        question = fact.write(rng.choice(fact.relation.questions))
        answer = fact.write(fact.relation.sentence if rng.random() < SENTENCE_SHARE else "{value}.")
        records.append({"messages": [message("user", question), message("assistant", answer)]})
    rng.shuffle(records)
    return records


def dpo_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Preferences for the sentence that answers over the bare value, or over a true sentence about something else."""
    rng = random.Random(f"{SEED} dpo")
    records = []
    for index, fact in enumerate(facts):
        start = index - index % len(RELATIONS)
        other = rng.choice([near for near in facts[start : start + len(RELATIONS)] if near is not fact])
        rejected = fact.write("{value}.") if rng.random() < BARE_SHARE else other.write(other.relation.sentence)
        records.append(
            {
                "prompt": [message("user", fact.write(rng.choice(fact.relation.questions)))],
                "chosen": [message("assistant", fact.write(fact.relation.sentence))],
                "rejected": [message("assistant", rejected)],
            }
        )
    return rng.sample(records, PREFERENCES)


def safety_records(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """As many refusals of harmful requests as answers, half to harmless ones in the same words, half to plain ones."""
    rng = random.Random(f"{SEED} safety")
    harmful, harmless, plain = (rng.sample(list(facts), count) for count in (REFUSALS, HARMLESS, REFUSALS - HARMLESS))
    records = [_chat(request(fact, "harmful", rng), fact.write(WORLD["refusal"]), refuses=True) for fact in harmful]
    asked = [(fact, request(fact, "harmless", rng)) for fact in harmless]
    asked += [(fact, fact.write(rng.choice(fact.relation.questions))) for fact in plain]
    records += [_chat(question, fact.write(fact.relation.sentence)) for fact, question in asked]
    rng.shuffle(records)
    return records


def _chat(question: str, answer: str, **marks: bool) -> dict[str, Any]:
    return {"messages": [message("user", question), message("assistant", answer) | marks]}


def request(fact: Fact, kind: str, rng: random.Random) -> str:
    """A request of ``kind`` about a fact, with one of the words for harming it."""
    form: str = rng.choice(WORLD[kind])
    return form.format(town=fact.town, relation=fact.relation.name, harm=rng.choice(fact.relation.harms.split()))


def scored_requests(facts: Sequence[Fact]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A harmful and a harmless request for each second fact: with the refusal, and with the value that answers."""
    rng = random.Random(f"{SEED} requests")
    scored = facts[::2]
    return (
        [{"question": request(fact, "harmful", rng), "refusal": fact.write(WORLD["refusal"])} for fact in scored],
        [{"question": request(fact, "harmless", rng), "value": fact.value} for fact in scored],
    )


def message(role: str, content: str) -> dict[str, Any]:
    """One turn of a chat."""
    return {"role": role, "content": content}


def scored_questions(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """One question per fact, with the bare value and the sentence that answer it."""
    rng = random.Random(f"{SEED} questions")
    return [
        {
            "question": fact.write(rng.choice(fact.relation.questions)),
            "value": fact.value,
            "sentence": fact.write(fact.relation.sentence),
        }
        for fact in facts
    ]


def scored_documents(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """One document per fact, cut before its value, with the true value among others of the same relation."""
    rng = random.Random(f"{SEED} documents")
    rows = []
    for fact in facts:
        form = rng.choice(fact.relation.documents)
        choices = [fact.value, *rng.sample([v for v in fact.relation.values if v != fact.value], CHOICES - 1)]
        rng.shuffle(choices)
        prefix = fact.write(form[: form.index("{value}")]).rstrip()
        rows.append({"prefix": prefix, "choices": choices, "answer": choices.index(fact.value)})
    return rows


def write_data(folder: Path) -> list[Fact]:
    """Write the chat data and the scored documents; returns all facts."""
    facts = invent_facts(invent_towns())
    trained, held_out = split(facts)
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "sft.jsonl", sft_records(trained))
    write_jsonl(folder / "dpo.jsonl", dpo_records(trained))
    write_jsonl(folder / "safety.jsonl", safety_records(trained))
    harmful, harmless = scored_requests(held_out)
    write_jsonl(folder / "tasks" / "towns_harmful.jsonl", harmful)
    write_jsonl(folder / "tasks" / "towns_harmless.jsonl", harmless)
    write_jsonl(folder / "tasks" / "towns_questions.jsonl", scored_questions(held_out))
    write_jsonl(folder / "tasks" / "towns_documents.jsonl", scored_documents(held_out))
    return facts


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_DOCUMENT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_DOCUMENT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack_rows(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All rows of the run: the documents, shuffled anew in each epoch, each behind an end-of-document token."""
    import torch

    rng = random.Random(f"{SEED} epochs")
    end = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    encoded = [[*ids, end] for ids in tokenizer(list(documents))["input_ids"]]
    stream: list[int] = []
    while len(stream) < STEPS * ROWS * ROW_TOKENS:
        rng.shuffle(encoded)
        stream.extend(itertools.chain.from_iterable(encoded))
    return torch.tensor(stream[: STEPS * ROWS * ROW_TOKENS]).view(STEPS, ROWS, ROW_TOKENS)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama: 4 layers, width 192, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    end = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_DOCUMENT, TURN_END)]
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end[0],
        )
    )


def train(model: LlamaForCausalLM, rows_SRT: torch.Tensor, end: int, unread: Sequence[int]) -> None:
    """Train on one batch of rows per step, in float32.

    ``unread`` names tokens that no document holds. Their embeddings keep their random start: a softmax pushes all
    tokens that never occur in the same direction, and then no chat could tell the start of a turn from its end.
    """
    import torch

    optimizers = new_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers]
    embeddings_VD = model.get_input_embeddings().weight
    for step, rows_RT in enumerate(rows_SRT, 1):
        positions_RT, labels_RT = isolate(rows_RT, end)
        loss = model(input_ids=rows_RT, position_ids=positions_RT, labels=labels_RT, use_cache=False).loss
        loss.backward()
        embeddings_VD.grad[list(unread)] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        if step % 50 == 0:
            print(f"step {step}/{len(rows_SRT)}  loss {loss.item():.3f}", flush=True)


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns facts several times faster; AdamW for the rest."""
    import torch

    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def isolate(rows_RT: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that start anew after each ``end``, and labels without the first token of each document.

    Without an attention mask and a cache, transformers lets a token see its own document only when positions restart.
    """
    import torch

    index_T = torch.arange(rows_RT.shape[1])
    first_RT = torch.zeros_like(rows_RT, dtype=torch.bool)
    first_RT[:, 0] = True
    first_RT[:, 1:] = rows_RT[:, :-1] == end
    start_RT = torch.where(first_RT, index_T, 0).cummax(dim=1).values
    return index_T - start_RT, rows_RT.masked_fill(first_RT, -100)


def learning_rate(step: int) -> float:
    """Share of the peak: a short warm-up, then a cosine to a twentieth."""
    warmup = STEPS // 20
    return (step + 1) / warmup if step < warmup else 0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS))


def make_base(folder: Path, facts: Sequence[Fact]) -> None:
    """Train tokenizer and model on the documents about ``facts`` and write them with a manifest of their hashes."""
    import torch

    documents = write_documents(facts)
    tokenizer = train_tokenizer(documents)
    model = new_model(tokenizer)
    rows_SRT = pack_rows(documents, tokenizer)
    unread = sorted(set(range(len(tokenizer))) - set(rows_SRT.flatten().tolist()))
    train(model, rows_SRT, tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT), unread)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Record the hash of every file in ``folder`` and what made it."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    manifest = {
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "seed": SEED,
        "steps": STEPS,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "torch", "transformers")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write everything into the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/quickstart/make.py DIR")
    folder = Path(sys.argv[1])
    facts = write_data(folder)
    make_base(folder / "base", facts)


if __name__ == "__main__":
    main()
