"""Train an agent in the twin: `python train_agent.py --algo ppo`, continue it: `--resume FOLDER`."""

from thermoe_env.commands import train

if __name__ == "__main__":
    train()
