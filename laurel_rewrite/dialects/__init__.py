"""One module a dialect of graphs: its op table, which is data, and the builder of `Dataflow` from it."""
