// Draws the charts and tables whose data stand in the page. Nothing is fetched.
const url = URL.createObjectURL(new Blob([TABLES], { type: "text/javascript" }));
const { default: DataTable } = await import(url);
URL.revokeObjectURL(url);

const data = (holder) => JSON.parse(holder.querySelector("script").textContent);
const pictures = [...document.querySelectorAll("script.pictures")].map((script) => JSON.parse(script.textContent));
const dark = () => document.documentElement.classList.contains("dark");

// Charts. Another theme draws them again. What stands in a closed group is drawn when the group is opened.
const charts = [...document.querySelectorAll(".chart")].map((holder) => {
  const spec = data(holder);
  const place = holder.appendChild(document.createElement("div"));
  return { spec, place };
});
const isOpen = (place) => !place.closest("details.group:not([open])");
const actions = { export: { svg: true, png: true }, source: false, compiled: false, editor: false };
const drawOne = async ({ spec, place }) => {
  const options = { actions, theme: dark() ? "dark" : undefined, config: { background: "transparent" }, renderer: "svg" };
  try {
    const { view } = await vegaEmbed(place, spec, options);
    view.addEventListener("click", (event, item) => item?.datum && chooseMark(item.datum));
  } catch (error) {
    place.textContent = `This chart cannot be drawn (${error.message}).`;
  }
};
const draw = () => Promise.all(charts.filter(({ place }) => isOpen(place)).map(drawOne));

const button = document.getElementById("theme");
const setTheme = (isDark) => {
  document.documentElement.classList.toggle("dark", isDark);
  button.setAttribute("aria-pressed", String(isDark));
  for (const { place } of charts) if (!isOpen(place)) place.replaceChildren();  // drawn again when it is opened
  return draw();
};
button.addEventListener("click", () => setTheme(!dark()));

// Tables.
const shown = (value) => {
  if (value === null || value === undefined) return "-";
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
};
const say = (text) => (document.getElementById("said").textContent = text);
const markdown = ({ header, body }) => {
  const line = (cells) => `| ${cells.map((cell) => cell.replaceAll("|", "\\|").replaceAll("\n", " ")).join(" | ")} |`;
  return [line(header), line(header.map(() => "---")), ...body.map(line)].join("\n");
};
const latexSigns = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" };
const latex = ({ header, body }) => {
  const escaped = (cell) => cell.replace(/[\\~^&%$#_{}]/g, (sign) => latexSigns[sign] ?? `\\${sign}`);
  const line = (cells) => `${cells.map(escaped).join(" & ")} \\\\`;
  return [`\\begin{tabular}{${"l".repeat(header.length)}}`, line(header), "\\hline", ...body.map(line), "\\end{tabular}"].join("\n");
};
const copied = (name, format) => ({
  text: name,
  action: async (event, table) => {
    const found = table.buttons.exportData({ columns: ":visible", modifier: { search: "applied" } });
    const text = format({ header: found.header.map(String), body: found.body.map((row) => row.map(String)) });
    try {
      await navigator.clipboard.writeText(text);
      say(`copied as ${name}`);
    } catch {
      say("the browser lets no page copy here: open the file from the disk");
    }
  },
});

// What is kept of a row's sample in its run. Two tasks can have samples of one id; a row without a task then has none.
const tasks = pictures.map((run) => new Set(Object.values(run).flatMap((samples) => samples.map(({ task }) => task))));
const kept = (row, run) => {
  const samples = pictures[run][row.id] ?? [];
  const own = tasks[run].has(row.task) ? samples.filter(({ task }) => task === row.task) : samples;
  return own.length === 1 ? own[0] : {};
};
const picture = (row, run) => {
  const box = document.createElement("span");
  for (const source of kept(row, run).pictures ?? []) {
    const image = box.appendChild(document.createElement("img"));
    image.className = "picture";
    image.src = source;
    image.alt = `picture of ${row.id}`;
  }
  return box;
};
const detail = (record, run) => {
  const list = document.createElement("dl");
  list.className = "detail";
  list.appendChild(picture(record, run)).classList.add("large");
  const { question, answers, choices } = kept(record, run);
  for (const [name, value] of Object.entries({ question, answers, choices, ...record })) {
    if (value === undefined) continue;
    list.appendChild(document.createElement("dt")).textContent = name;
    list.appendChild(document.createElement("dd")).textContent = shown(value);
  }
  return list;
};

const makeTable = (holder, columns, rows, run) => {
  const seen = holder.className === "samples" && rows.some((row) => kept(row, run).question !== undefined);
  const added = seen
    ? [
        { title: "picture", data: (row) => row, orderable: false, searchable: false,
          render: (row, type) => (type === "display" ? picture(row, run) : "") },
        ...(columns.includes("question") ? [] : [{ title: "question", data: (row) => kept(row, run).question ?? "",
          render: DataTable.render.text() }]),
      ]
    : [];
  const element = holder.appendChild(document.createElement("table"));
  element.className = "display compact";
  const table = new DataTable(element, {
    data: rows,
    columns: added.concat(columns.map((name) => ({
      title: DataTable.util.escapeHtml(name),
      data: (row) => row[name] ?? null,
      render: (value, type) => (type === "sort" || type === "type" ? value : DataTable.render.text().display(shown(value))),
    }))),
    order: [],
    pageLength: 10,
    autoWidth: false,
    layout: { topStart: { buttons: ["csv", copied("Markdown", markdown), copied("LaTeX", latex)] }, bottomStart: "pageLength" },
  });
  const open = (row) => {
    if (row.child.isShown()) row.child.hide();
    else row.child(detail(row.data(), run)).show();
    row.node().setAttribute("aria-expanded", String(row.child.isShown()));
  };
  table.on("click", "tbody > tr", (event) => {
    const row = table.row(event.target.closest("tr"));
    if (row.data()) open(row);
  });
  table.on("keydown", "tbody > tr", (event) => {
    if (event.key === "Enter") open(table.row(event.target.closest("tr")));
  });
  table.on("draw", () => table.rows({ page: "current" }).nodes().to$().attr("tabindex", "0"));
  table.draw(false);
  if (rows.some((row) => row.correct === false)) {
    const label = document.createElement("label");
    const box = label.appendChild(document.createElement("input"));
    box.type = "checkbox";
    label.append(" only wrong answers");
    holder.prepend(label);
    box.addEventListener("change", () => {
      table.search.fixed("wrong", box.checked ? (text, row) => row.correct === false : null).draw();
    });
  }
  return table;
};
const tables = [...document.querySelectorAll(".rows, .samples")].map((holder) => {
  const { columns, rows } = data(holder);
  const run = Number(holder.closest("[data-run]")?.dataset.run ?? 0);
  return { columns, rows, holder, run, made: null };
});
// The table, which is made when it is first shown. (In a closed group it would be laid out where nothing has a size.)
const tableOf = (one) => {
  if (!one.made) {
    one.made = makeTable(one.holder, one.columns, one.rows, one.run);
    if (cell !== null && one.columns.includes("cell")) showCell(one);
  }
  return one.made;
};
const showTables = () => tables.filter(({ holder }) => isOpen(holder)).forEach(tableOf);
const fill = (group) => {
  showTables();
  return Promise.all(charts.filter(({ place }) => group.contains(place) && !place.hasChildNodes()).map(drawOne));
};
for (const group of document.querySelectorAll("details.group")) {
  group.addEventListener("toggle", () => group.open && fill(group));
}
// Opens the group in which something stands.
const open = async (place) => {
  const group = place.closest("details.group");
  if (!group) return;
  group.open = true;
  await fill(group);
};
const goTo = async (place) => {
  await open(place); // first, so that everything before it has its size
  place.scrollIntoView({ block: "start" });
};

// Says at the top of a part what alone is shown of it. The button ends it.
const note = (place, text, end) => {
  place.querySelector(":scope > .chosen")?.remove();
  const said = document.createElement("p");
  said.className = "chosen";
  said.setAttribute("role", "status");
  said.append(`only ${text} `);
  const all = said.appendChild(document.createElement("button"));
  all.textContent = "show all";
  all.addEventListener("click", () => {
    end();
    said.remove();
  });
  place.prepend(said);
};

// A click on a cell of a chart shows its rows alone, in every table that has cells.
let cell = null;
const showCell = ({ made, holder }) => {
  made.search.fixed("cell", (text, row) => row.cell === cell).draw();
  note(holder, `the cell ${cell}`, () => made.search.fixed("cell", null).draw());
};
const chooseCell = (chosen) => {
  cell = chosen;
  const having = tables.filter(({ columns }) => columns.includes("cell"));
  const made = having.filter((one) => one.made);
  made.forEach(showCell);
  const [first] = [...made.filter(({ holder }) => isOpen(holder)), ...having];
  if (first) goTo(first.holder);
};

// A click on an estimate shows the samples behind it alone: those of the files in its folders.
const parts = [...document.querySelectorAll("main section")].filter((part) => part.querySelector(".samples"));
const showParts = (isShown) => parts.forEach((part) => (part.hidden = !isShown(part)));
const showAllParts = () => {
  document.querySelectorAll("main section > .chosen").forEach((said) => said.remove());
  showParts(() => true);
};
const chooseFolders = (folders, name) => {
  const behind = ({ dataset }) => folders.some((folder) => dataset.file.startsWith(`${folder}/`));
  showAllParts();
  const first = parts.find(behind);
  if (!first) return say(`the page has no samples of ${name}`);
  showParts(behind);
  note(first, `samples of ${name}`, showAllParts);
  goTo(first);
};
const nameOf = ({ panel, row, series }) => [...new Set([row, series, panel].filter(Boolean))].join(", ");
const chooseMark = (mark) => {
  if (mark.cell !== undefined) chooseCell(mark.cell);
  else if (mark.folders !== undefined) chooseFolders(mark.folders, nameOf(mark));
};

// The same by keyboard: a list of the marks of each chart that have something to show.
const haveCells = tables.some(({ columns }) => columns.includes("cell"));
const marksOf = (spec) => {
  const found = new Map();
  JSON.stringify(spec, (key, value) => {
    if (haveCells && typeof value?.cell === "string") found.set(`the cell ${value.cell}`, value);
    else if (parts.length && Array.isArray(value?.folders)) found.set(`samples of ${nameOf(value)}`, value);
    return value;
  });
  return found;
};
for (const { spec, place } of charts) {
  const marks = marksOf(spec);
  if (!marks.size) continue;
  const label = document.createElement("label");
  label.className = "cells";
  label.append("only ");
  const list = label.appendChild(document.createElement("select"));
  for (const name of ["", ...marks.keys()]) list.add(new Option(name || "(choose)", name));
  list.addEventListener("change", () => list.value && chooseMark(marks.get(list.value)));
  place.after(label);
}

// A link to a sample: #sample=ID.
const follow = async () => {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("sample");
  const found = tables.find(({ rows }) => wanted !== null && rows.some((row) => row.id === wanted));
  if (!found) return;
  if (found.holder.closest("[hidden]")) showAllParts();
  await open(found.holder);
  const table = tableOf(found);
  const index = found.rows.findIndex((row) => row.id === wanted);
  const place = table.rows({ order: "applied", search: "applied" }).indexes().toArray().indexOf(index);
  if (place < 0) return say(`a filter hides the sample ${wanted}`);
  table.page(Math.floor(place / table.page.len())).draw("page");
  const row = table.row(index);
  if (!row.child.isShown()) row.child(detail(row.data(), found.run)).show();
  row.node().classList.add("linked");
  found.holder.scrollIntoView();
};
addEventListener("hashchange", follow);

showTables();
await setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
await follow();
document.documentElement.dataset.ready = "yes";
