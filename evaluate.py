"""Compare policies on the same requests: `python evaluate.py --policy rule_based`."""

from thermoe_env.commands import evaluate

if __name__ == "__main__":
    evaluate()
