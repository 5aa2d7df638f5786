"""Requests of many tokens: prompts and answers, run together step by step."""
