"Data sets: from archives and folders to DataLoaders."
