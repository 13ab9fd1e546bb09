"""Why a too large coefficient breaks the model: one direction at rising strengths, in arms that tell causes apart."""

from steering.command_line import main

if __name__ == "__main__":
    main("diagnose-breakdown")
