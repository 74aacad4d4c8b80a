"""The gate: scores in, verdict out.

The part of posttrain to be trusted, and therefore to be read: it decides about an artifact from the scores of single
documents, without torch, lm_eval, models or data sets. An import contract in pyproject.toml holds it to that.

Read in this order::

    spec        GateRequest and Scorecard in, Verdict out; every number that a verdict holds
    roles       lift, guard, limit: the demand of each, in one table
    verdict     judge(): the way from one to the other, and verdict.json
    matching    scores paired by document; every reason to reject a scorecard
    comparison  questions and their answers: task by task, all guards together, all lifts together
    evidence    the choice of an interval by the kind of scores
    statistics  the intervals, Holm's correction, power; each with its source
    sequential  early decisions
    slices      where a loss or a lift comes from
    halves      one half of the documents to choose on, one to judge the chosen on
    reasons     a verdict in words
    procedure   a gate asked through the plugins' hooks, and the consequence of its verdict

Three rules hold throughout. A doubt is never a pass: missing, doubled, stale or infinite scores raise ArtifactDamaged,
and too little evidence is ``undecided``. A bound decides, never a mean. All evidence is oriented: more is better.
"""
