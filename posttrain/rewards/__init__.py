"""Rewards: named functions that score an answer to a question, and the comparisons that gates share with them.

matching    comparing a text with a right answer, for gates and rewards alike
reward      a reward as a plugin registers it, and answers scored by a weighted sum of several
shipped     the rewards that come with posttrain
"""
