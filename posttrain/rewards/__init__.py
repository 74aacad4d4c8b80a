r"""Rewards: named functions that score an answer to a question, and the comparisons that gates share with them.

matching    comparing a text with a right answer, for gates and rewards alike
reward      a reward as a plugin registers it, and the scores that it gives
scorer      answers scored by a weighted sum of rewards
maths       \boxed{...} compared as mathematics, in a process of its own
code        programs scored by a question's tests, with the user's consent
sandbox     programs of models, run where they can do no harm
cell        the inside of the sandbox, a program of its own
judge       answers judged by a language model behind an endpoint
shipped     the rewards that come with posttrain
"""
