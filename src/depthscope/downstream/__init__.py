"""Accuracy on downstream tasks with lm-eval, on documents from the Hugging Face Hub or a folder.

    tasks.py        names of tasks -> lm-eval's tasks, with their documents
    harness.py      a loaded model in the class that lm-eval needs
    evaluation.py   evaluate(): a model and names of tasks in, a Downstream out

Nothing is imported here, because importing lm-eval takes seconds.
"""
