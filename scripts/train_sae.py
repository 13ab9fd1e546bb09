"""Train one or several dictionaries on an activation cache."""

from sae.command_line import train_sae

if __name__ == "__main__":
    train_sae()
