"""The ladder: the same real rows on the same model, one change a rung, each run in a process of its own.

__main__.py    the command: runs rungs in turn, keeps results, prints tables
rungs.py       what each rung is
workloads.py   which rows each step holds, as token ids and targets, written for all rungs alike
child.py       one run of a rung
steps.py       the training steps of a run: passes, losses, times
pairs.py       the same for chosen and rejected answers, by DPO
trl_env.py     TRL's own virtual environment
trl_run.py     one run of TRL's trainers, in that environment
table.py       results as tables
curves.py      two loss curves beside each other
record.py      what is told of a run: memory, times, machine
"""
