"""A transformer as data: a graph per block type, and a program of calls.

A torch model and its family's row enter; block types, traced once, and the calls of them leave.

    program       What a component is to export: block types, and the calls of them in order
    blocks        A transformer as a program: its block types, each traced once
    prepare       A transformer made ready for tracing: its blocks in export's form
    trace         One torch module traced once to an ONNX graph whose weights are inputs
    attention     FLUX attention written for export: the same arithmetic as diffusers'
    rules         Rewriting rules for traced graphs (onnx_ir)
    clean         A traced graph made fit to ship: constants folded, rules applied
    routers       Groups of blocks in a program: which calls belong to one
    block_choice  Which blocks of a group run, as ONNX: the choice as a function
    references    Keys and values of reference tokens, kept from step to step
    compose       A component as one ONNX model: a function per block type, a call per block
"""
