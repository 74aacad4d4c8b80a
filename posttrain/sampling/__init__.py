"""Answers that a model samples to questions, and the training records made of them.

sampler    the token loop: a batch of prompts, several answers to each, every answer with a seed of its own
answers    the answers of a model to questions, kept by content: what was written is never asked again
trail      the answers of a stage that learns from them, a file for each step
keeping    records of sampled answers: pairs, the best, or judged answers
"""
