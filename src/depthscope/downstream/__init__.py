"""Accuracy on downstream tasks through lm-eval, with documents of the Hugging Face Hub or of a folder.

    record.py       Accuracy, Downstream: what was measured, and its JSON
    tasks.py        names of tasks -> lm-eval's tasks, on the documents that were asked for
    harness.py      a loaded model as lm-eval wants it
    evaluation.py   evaluate(): a model and names of tasks in, a Downstream out

Nothing is imported here: lm-eval takes seconds, and a report only needs the record.
"""
