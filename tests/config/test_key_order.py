"""What a plain recipe stands for, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

WORDS = ["sequence_length", "epochs", "lr", "packing", "neftune_alpha", "gradient_accumulation", "loss_chunk"]
PRINTED = """
import json
from pathlib import Path
from posttrain.config.plain import Known, full_form
from posttrain.errors import BadInput
from posttrain.sft.config import SFTConfig
known = Known(stages={"sft": SFTConfig}, nodes=(), is_model=bool, is_gate=bool, gate=lambda name: {})
print(json.dumps(full_form(Path("mine"), dict.fromkeys(%s, 1), known)))
wrong = {f"wrong{number}": 1 for number in range(9)}
try:
    full_form(Path("mine"), {"model": wrong, "gate": wrong, "sft": wrong, **wrong}, known)
except BadInput as error:
    print(error)
"""


def test_the_order_of_keys_and_problems_is_that_of_the_recipe_in_every_process() -> None:
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in "012"]
    program = [sys.executable, "-c", PRINTED % WORDS]
    said = {
        subprocess.run(program, env=each, text=True, capture_output=True, check=True).stdout for each in environments
    }
    (text,) = said
    node = json.loads(text.splitlines()[0])[0]["sft"]
    assert [key for key in node if key in WORDS] == WORDS
    places = [text.index(f"model.wrong{number}: ") for number in range(9)]
    assert places == sorted(places)
