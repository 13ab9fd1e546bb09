"""Find why a too large coefficient breaks the model: one direction at rising strengths, in arms that separate the causes."""

from steering.command_line import main

if __name__ == "__main__":
    main("diagnose-breakdown")
