"""The help of every command: its words, its flags, an example. Standard library alone, so that it is shown at once."""

from __future__ import annotations

import re

RECIPE_FLAGS = """\
  --config-dir DIR   your own gates, models and variants, as in DIR/gate/NAME.yaml; may be repeated
  --trust-tasks      let task files of your own run their code"""
ROOT_FLAG = "  output_root=DIR    folder of the runs; ./runs by default"
FORMAT_FLAG = "  --format NAME      "
PAGES = {
    "run": f"""\
posttrain recipe=NAME [key=value ...]
Run a recipe, or resume it: train, score and decide, stage by stage.

  key=value          any setting, such as sft.lr=1e-3; posttrain list STAGE has them, posttrain show those of a recipe
  gate@STAGE.gate=X  another gate of a stage
  +stage@NAME=KIND   one more stage; ~stage@NAME takes one out; 'stages=[sft,dpo]' selects and orders
  --multirun, -m     run every combination of comma-separated values; select=best chooses one on half of the last gate's
                     documents and judges it on the other half
  --dry-run          posttrain plan
  --verbose, -v      show the debug lines of every library; posttrain.log in the run's folder has what was shown
{RECIPE_FLAGS}

Example: posttrain recipe=quickstart sft.epochs=3""",
    "plan": f"""\
posttrain plan recipe=NAME [key=value ...]     or posttrain recipe=NAME ... --dry-run
Check a recipe with all of its problems at once, and show its stages, settings, memory, disk, steps, time, cost and
gates. Trains nothing.

  on=GPU             the GPUs to plan for, such as on=H100, on='8 x A100' or on=24GB; by default this machine
  fit=24GB           propose settings that fit into such a GPU, or into fit='2 x H100', and plan with them
  --measure          take two steps of the first stage here, and expect the time of all stages by their speed
  --json             print JSON
{RECIPE_FLAGS}

Example: posttrain plan recipe=quickstart sft.lr=1e-3""",
    "show": f"""\
posttrain show recipe=NAME [key=value ...]
Print a recipe in full, after each value the place that it comes from. What is printed is a recipe, too.

  --all              defaults, too
{RECIPE_FLAGS}

Example: posttrain show recipe=quickstart variant=full""",
    "init": """\
posttrain init FILE [--model DIR] [--pairs FILE] [--questions FILE] [--name NAME]
Look at a file of chats and write a commented recipe into ./recipes. A tenth of the chats is set aside for its gate.

  --model DIR        the model: a folder, or a name on the hub
  --pairs FILE       pairs of a chosen and a rejected answer: adds a DPO stage
  --questions FILE   your own questions with their answers, for the gate in place of chats set aside
  --name NAME        name of the recipe; by default that of the file. Nothing is written over

Example: posttrain init chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct""",
    "runs": f"""\
posttrain runs [recipe=NAME] [RUN ...]
List the runs, the newest first: state, lifts, time, and the settings in which those of one recipe differ.

  --html             write runs.html: lifts, settings, curves and answers of the named runs, or of all, side by side
{ROOT_FLAG}
{FORMAT_FLAG}table, markdown or json

Example: posttrain runs recipe=quickstart""",
    "tokens": f"""\
posttrain tokens recipe=NAME [key=value ...]
Show rendered records and a packed row as the model reads them, trained tokens marked, and count them.

  --all              read every record, not the first 1,000 of each source
{RECIPE_FLAGS}

Example: posttrain tokens recipe=quickstart 'stages=[sft]'""",
    "data": f"""\
posttrain data recipe=NAME [key=value ...]
Prepare the data of every stage and show the rows left out, by source and rule. Writes a ledger of every row and one
page to look at them. Trains nothing.

  --json             print JSON
{RECIPE_FLAGS}

Example: posttrain data recipe=quickstart sft.prepare.near.threshold=0.7""",
    "doctor": f"""\
posttrain doctor recipe=NAME [key=value ...]
Prove on the recipe's own model and data that loss and gradient are right, against plain float64. Ends with 5 when not.

{RECIPE_FLAGS}

Example: posttrain doctor recipe=quickstart""",
    "list": """\
posttrain list [LIST | STAGE | NODE | gate NAME | tasks [PATTERN]]
Print what is available: recipes, stages, gates, models, variants, trackers, launches, settings, plugins.

  STAGE              the settings of a stage, such as sft
  NODE               those of model, source, lora, gate, task or launch
  gate NAME          the tasks of a gate and its settings
  tasks [PATTERN]    names of lm-eval's tasks and of plugins', such as 'gsm8k*'
  --json             print JSON

Example: posttrain list sft""",
    "gate": """\
posttrain gate adapter=DIR gate=NAME [key=value ...]
Judge an existing adapter or model, for CI. Ends with 0 when it passes, 3 when it fails, 4 when undecided.

  adapter=FILE.gguf  a file of llama.cpp, with gate.backend=llama
  baseline=FILE|DIR  compare with the scores in FILE.json, or with an earlier adapter
  --update-baseline  write the scores of an adapter that passes into the baseline
  junit=FILE         write JUnit XML; markdown=FILE writes the comment for a pull request
  model.path=DIR     the base, where it has moved; gate_data=FILE the rows for gates that ask for them
  --config-dir DIR   your own gates, as in DIR/gate/NAME.yaml
  --trust-tasks      let task files of your own run their code

Example: posttrain gate adapter=runs/quickstart-1a2b/stages/sft/artifact gate=quickstart junit=gate.xml""",
    "merge": """\
posttrain merge ADAPTER_DIR OUTPUT_DIR
Write an adapter, an artifact or any of peft's, and its base as one model, once its logits are shown to match.

  model.path=DIR     the base, where it has moved; model.revision=COMMIT

Example: posttrain merge runs/quickstart-1a2b/stages/sft/artifact merged""",
    "export": """\
posttrain export ARTIFACT --to merged|gguf|gguf-lora [type=f16|f32|q8_0] [output=DIR]
Write an artifact as one model, or as files for llama.cpp. Ids, log-probabilities and greedy answers of a file are
compared with the artifact's before it is called done.

  --to FORM          merged: one model of transformers. gguf: one file. gguf-lora: the adapter alone, for its base
  type=NAME          f16 by default, and f32, have to agree; q8_0 is marked lossy until a gate passes it
  pretokenizer=NAME  the splitting rule of llama.cpp for a tokenizer that it does not know, such as llama-bpe
  output=DIR         the folder to write; model.path=DIR is the base, where it has moved

Example: posttrain export runs/quickstart-1a2b/stages/dpo/artifact --to gguf type=q8_0""",
    "report": """\
posttrain report [RUN]
Print the table of a run, by default the newest below ./runs, and write its report.html and report.md again. RUN may be
a folder below runs/gates: then the verdict of posttrain gate is made again from its scores, and its page with it.

Example: posttrain report quickstart-1a2b3c4d5e6f""",
    "leaderboard": f"""\
posttrain leaderboard [task=NAME] [top=N]
Rank every recorded artifact beside its base, by task.

  top=N              entries of each task in the terminal, 50 by default
  --html             write one page that filters and sorts without a server
{ROOT_FLAG}
{FORMAT_FLAG}table, markdown or json

Example: posttrain leaderboard task=gsm8k --format markdown""",
    "ledger": f"""\
posttrain ledger export|verify|rebuild
Every recorded lift: print them, detect rows that were changed, or rebuild them from the runs.

{ROOT_FLAG}
{FORMAT_FLAG}with export: jsonl or csv

Example: posttrain ledger verify""",
    "card": f"""\
posttrain card ARTIFACT [output=FILE] [base_model=OWNER/NAME] [license=ID]
Write the README.md of an artifact for the hub: lineage, data, gate, and what was not measured.

  output=FILE        write it elsewhere
{ROOT_FLAG}

Example: posttrain card runs/quickstart-1a2b/stages/sft/artifact license=apache-2.0""",
    "push": f"""\
posttrain push ARTIFACT OWNER/NAME [public=true] [base_model=OWNER/NAME] [license=ID]
Upload a promoted artifact with its card as a revision named by its digest; private by default, the token in HF_TOKEN.

{ROOT_FLAG}

Example: posttrain push runs/quickstart-1a2b/stages/sft/artifact me/my-adapter""",
    "serve": f"""\
posttrain serve RUN|ARTIFACT... [--port N] [--host ADDRESS]
Serve promoted artifacts and their base over HTTP in OpenAI's form, each proven first.

  --port N           8000 by default
  --host ADDRESS     address to listen on; by default this machine alone
  --token-file FILE  token that a client has to give; or POSTTRAIN_TOKEN in the environment
  --allow-unpromoted serve what no gate passed, too
  --check URL        ask the same proof of a running server, and start none
  --backend vllm     vLLM generates, in a process of its own; --vllm-command CMD starts it, 'vllm serve' by default
{ROOT_FLAG}

Example: posttrain serve runs/quickstart-1a2b --port 8000""",
    "chat": """\
posttrain chat RUN|ARTIFACT... [model=NAME[,NAME]] [temperature=0] [max_tokens=256]
Talk with promoted artifacts in the terminal, with several side by side. /model NAME switches, /quit ends.

  model=NAME         latest by default; v1, v2 and base are names, too
  --allow-unpromoted load what no gate passed, too

Example: posttrain chat runs/quickstart-1a2b model=v1,v2""",
    "promote": f"""\
posttrain promote ALIAS DIGEST
Name a promoted artifact for users, as a row of the ledger. Running servers follow within a second.

  --allow-unpromoted name what no gate passed, too
{ROOT_FLAG}

Example: posttrain promote live 8c5d4f0b1a2e""",
    "rollback": f"""\
posttrain rollback ALIAS
Give a name back to the artifact that had it before, as another row of the ledger.

{ROOT_FLAG}

Example: posttrain rollback live""",
    "sample": f"""\
posttrain sample ARTIFACT QUESTIONS OUTPUT.jsonl [k=8] [temperature=0.7] [keep=pairs|best|labels]
Write training records made of an artifact's own answers, each scored by a reward, and beside them where they come from.

  k=N                answers to each question; max_tokens=N limits each
  reward=NAME        right by default: the answer of the question, by its own way of matching
  keep=FORM          pairs for dpo, best for sft, labels for kto
  backend=vllm       vLLM answers, in a process of its own; --vllm-command CMD starts it, 'vllm serve' by default
  --trust-tasks      let a reward of your own run its code
{ROOT_FLAG}

Example: posttrain sample runs/quickstart-1a2b/stages/sft/artifact questions.jsonl pairs.jsonl""",
    "new-plugin": """\
posttrain new-plugin NAME
Write a distribution with a stage of your own, its tests and its recipe into ./posttrain-NAME.

Example: posttrain new-plugin rejection""",
}  # fmt: skip
"""The page of each command; ``run`` is the one of a recipe."""


def help_of(command: str) -> str:
    """Return the page of a command."""
    return f"{PAGES[command]}\n"


def flags_of(command: str) -> list[str]:
    """Return the flags of a command: those that its page names."""
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", PAGES[command])))
