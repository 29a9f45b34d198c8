"""Front end: the tab, in AUTOMATIC1111 and the Forge family (a1111_extension/) and by itself
(`continual-lora ui`).

    job.py, runner.py   a worker process and its reports; one job at a time     standard library alone
    environment.py      the worker's Python environment, made once              standard library alone
    host.py             the program around, stacks, jobs: for tab and API       no gradio
    shown.py, labels.py how a job and a stack are described; names of things    no gradio
    copies.py           copies of the pictures that jobs learn from             no gradio
    asking.py           what a click that takes something away will do          no gradio
    api.py              what the tab does, as JSON over HTTP                    fastapi alone
    tab.py, handlers.py the layout, and what its clicks do (uploads.py)         gradio 3.41 to 6
    alone.py, a1111.py  the tab by itself; what it needs of a web UI            gradio
"""
