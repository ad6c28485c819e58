"""The Space's program: `python app.py` serves the page.

Everything is imported inside the guard, because each job's process imports this file again.
"""

if __name__ == "__main__":
    import os
    import sys

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    import zero_gpu

    if zero_gpu.is_here():
        zero_gpu.lent()  # the platform looks for the decorated function when the app starts

    from interface import build, launch_options
    from processes import remove_stale_folders
    from service import Service

    remove_stale_folders()
    try:
        service = Service()
    except ValueError as error:  # a limit that is none
        sys.exit(str(error))
    build(service).launch(**launch_options(service))
