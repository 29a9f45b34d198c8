"""Front end: the tab, in AUTOMATIC1111 and the Forge family (a1111_extension/) and by itself
(`continual-lora ui`).

    job.py, runner.py   a worker process and its events; one job at a time      standard library
    environment.py      the worker's Python environment, created once           standard library
    host.py             host program, stacks and jobs, for tab and API          no gradio
    shown.py, labels.py texts about jobs and stacks; names of methods, fields   no gradio
    album.py, cards.py  what the page keeps and shows of concepts               no gradio
    copies.py           copies of the pictures that jobs learn from             no gradio
    asking.py           the question before a destructive click                 no gradio
    api.py              what the tab does, as JSON over HTTP                    fastapi
    tab.py, outputs.py  the layout, and which parts of it change                gradio 3.41 to 6
    view.py             what it shows                                           gradio
    events.py           which handler each click has, and what it reads         gradio
    handlers.py         what clicks do (uploads.py)                             gradio
    alone.py, a1111.py  the standalone tab; the tab in a web UI                 gradio
"""
