"""Front end: the tab, in AUTOMATIC1111 and the Forge family (a1111_extension/) and by itself
(`continual-lora ui`).

job.py            a worker process and what it told so far        standard library alone: this runs
inside the host
environment.py    the worker's Python environment, made once      standard library alone
tab.py            the gradio tab                                  gradio 3.41 to 6
    api.py            the same deeds as JSON over HTTP                fastapi, which gradio brings
    a1111.py          what both need of the web UI                    only inside one
"""
