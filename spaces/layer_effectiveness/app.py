"""The Space's program: `python app.py` serves the page.

    page      tabs, endpoints and the server; `page.results` shows reports
    jobs      analyses: the queue, the processes and the work
    safety    limits, and checks of uploads and models from the Hub

Each room imports only from itself and from those below it. Everything is imported inside the guard, because the process
of each job imports this file again.
"""

if __name__ == "__main__":
    import os
    import sys

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    from jobs.processes import gradio_folder, remove_stale_folders

    remove_stale_folders()
    os.environ["GRADIO_TEMP_DIR"] = str(gradio_folder())  # before anything imports gradio

    from jobs import zero_gpu

    if zero_gpu.is_here():
        zero_gpu.lent()  # the platform looks for the decorated function when the app starts

    try:
        from jobs.service import Service
        from page.interface import build, launch_options
        from page.serving import serve

        service = Service()
    except ValueError as error:  # not a valid limit
        sys.exit(str(error))
    serve(build(service), service, launch_options(service))
