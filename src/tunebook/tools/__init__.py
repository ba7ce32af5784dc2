"""What belongs to a run but is not training: the commands of `tunebook`.

In: recipes, runs, models. Out: what is printed, or a file that was named. Imports every other room.
"""
