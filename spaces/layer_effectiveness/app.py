"""The Space's program: `python app.py` serves the page.

Everything is imported inside the guard, because each job's process imports this file again.
"""

if __name__ == "__main__":
    import os
    import sys

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    from processes import gradio_folder, remove_stale_folders

    remove_stale_folders()
    os.environ["GRADIO_TEMP_DIR"] = str(gradio_folder())  # before anything imports gradio

    import zero_gpu

    if zero_gpu.is_here():
        zero_gpu.lent()  # the platform looks for the decorated function when the app starts

    try:
        from interface import build, launch_options
        from service import Service
        from serving import serve

        service = Service()
    except ValueError as error:  # a limit that is none
        sys.exit(str(error))
    serve(build(service), service, launch_options(service))
