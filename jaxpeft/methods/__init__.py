"""One file per method, found by its name: `jaxpeft/methods/<name>.py` has the public factory `<name>`, and ends with

    ABOUT = About(...)     what it is, what trains, what a step with it promises, its defaults and its form in PEFT

(see jaxpeft/about.py). Nothing outside a file knows its method's name.
"""
