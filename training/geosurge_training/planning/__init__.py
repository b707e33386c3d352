"""What a run will take, before anything starts: parameters, memory, arithmetic and time.

`footprint` counts what a computation costs without doing it, `towers` finds out what an encoder is made of without its
weights, `extent` how many images and cells there are, and `plan` puts them together; `gpus` holds published figures.
"""
