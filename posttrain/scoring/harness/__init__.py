"""The only importer of lm_eval: its tasks, the requests of their documents, the models, the scores.

lm_eval's own ``evaluate`` is not used: it would build few-shot prompts anew for each system, score NaN as a wrong
answer, and print. Its templates are rendered in a sandbox from the first import of this package on.
"""

from posttrain.scoring.harness.templates import install

install()
