"""Why a too large coefficient breaks the model: passes with parts frozen, and what changes inside."""
