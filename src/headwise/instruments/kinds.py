"""What a head mostly does, as a name that is given only with the numbers that justify it."""

KINDS = (
    "previous-token", "induction", "duplicate", "retrieval", "sink", "broad", "delimiter",
    "positional", "local", "mixed",
)
