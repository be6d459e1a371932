"""Results in the form that servers load: a plain transformers folder, a GGUF file, a folder for Ollama.

    found --plain.py--> plain folder --convert.py--> GGUF --ollama.py--> Modelfile
                            |                          |
                         hf.py                      check.py: llama-server (server.py) against transformers

Nothing is kept that was not loaded again and compared. llama.cpp comes from packages of its own (tools.py).
"""
