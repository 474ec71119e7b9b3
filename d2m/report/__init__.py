"""The report of a conversion.

A dict of everything that was measured enters, report.json and report.html leave.

    build     The report of a conversion: `report.json` holds every number of it
    page      `report.html`
    training  The report's sections of charts: training, experts, importance
    routing   The sections of a report on what is chosen where: experts by place, blocks
    pareto    Score against cost
    charts    Charts as SVG, drawn by matplotlib from plain numbers
    section   A headed part of a page: charts, their keys and a table, as base.html.j2 writes them
"""
