"""One module a stage: a function from the configuration and a folder to a frozen result. No stage imports another's."""
