"""Public name -> the module of this room that defines it."""

EXPORTS: dict[str, str] = {
    "Step": "headwise.compress.step",
    "steps_of": "headwise.compress.step",
    "take": "headwise.compress.step",
}
