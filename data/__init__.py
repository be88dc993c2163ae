"""Data: from text files to the micro-batches of a training step.

The way of a token:

     1. data/text/input_files.py    find the text files and divide them into parts
     2. data/text/documents.py      read the documents of a part
     3. data/text/duplicates.py     drop documents that occurred before
     4. data/shards/tokenizer.py    encode each kept document and end it with an end-of-document token
     5. data/text/preparation.py    run steps 1 to 4 as resumable jobs, then cut the tokens into shards
     6. data/shards/writer.py       write each shard as a tar; data/shards/manifest.py lists all shards and their sha256
     7. data/fetch/sources.py       in training: find the dataset's files by address and fetch them into a cache
     8. data/stream/order.py        compute which shard and which sample belong to each position of the run
     9. data/stream/samples.py      read those tokens; data/shards/verified_file.py checks every byte before it is used
    10. data/stream/token_stream.py stack the samples into micro-batches for one data-parallel rank

`data.prepare` runs steps 1 to 6 and `TokenStream` steps 7 to 10. With several datasets, data/stream/mixture.py chooses
the dataset before step 8. With text shards (`data.index`), data/shards/text_shard.py encodes the text during step 9.
"""
