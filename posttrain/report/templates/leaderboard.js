"use strict";
const boards = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = ["artifact", "recipe", "lineage", "n", "score", "lift over base", "verdict", "names"];
const NUMBERS = new Set([3, 4, 5]);
const STEP = 200;
const filter = document.getElementById("filter");
const task = document.getElementById("task");
const passed = document.getElementById("passed");

function make(name, text, kind) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function fill(node, text) {  // a name breaks between its words
  text.split(/(?<=[_./-])(?=[^_./-])/).forEach((word, place) => {
    if (place > 0) node.append(make("wbr"));
    node.append(word);
  });
  return node;
}

function shownRows(board) {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = board.rows.filter(row =>
    (!passed.checked || row.base || row.cells[6] === "pass") && words.every(word => row.search.includes(word)));
  if (board.sorted === undefined) return rows;
  const key = row => NUMBERS.has(board.sorted) ? row.keys[board.sorted - 3] : row.cells[board.sorted];
  const order = board.down ? -1 : 1;
  return [...rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return a < b ? -order : a > b ? order : 0;
  });
}

function line(row) {
  const node = make("tr", undefined, row.base ? "base" : "");
  row.cells.forEach((text, place) => {
    const cell = node.appendChild(make("td", undefined, NUMBERS.has(place) ? "" : "text untrusted"));
    if (place > 0 && text) cell.dataset.label = COLUMNS[place];
    if (place === 0 && row.report) {
      const link = cell.appendChild(make("a", text));
      link.href = row.report;
    } else if (NUMBERS.has(place)) cell.textContent = text;
    else fill(cell, text);
  });
  return node;
}

function draw(board) {
  const rows = shownRows(board);
  board.body.replaceChildren(...rows.slice(0, board.limit).map(line));
  board.more.hidden = rows.length <= board.limit;
  board.more.textContent = `${rows.length - board.limit} more`;
  board.section.hidden = Boolean(task.value && task.value !== board.task) || rows.length === 0;
  board.heads.forEach((head, place) => head.setAttribute("aria-sort",
    place !== board.sorted ? "none" : board.down ? "descending" : "ascending"));
}

function sort(board, place) {
  board.down = board.sorted === place ? !board.down : NUMBERS.has(place);
  board.sorted = place;
  draw(board);
}

function build(board) {
  for (const row of board.rows) row.search = row.cells.join(" ").toLowerCase() + " " + row.digest;
  board.limit = STEP;
  board.section = document.getElementById("boards").appendChild(make("section"));
  board.section.append(make("h2", board.title, "untrusted"));
  if (board.note) board.section.append(make("p", board.note, "remark"));
  const table = board.section.appendChild(make("table"));
  const top = table.appendChild(make("thead")).appendChild(make("tr"));
  board.heads = COLUMNS.map((name, place) => {
    const head = top.appendChild(make("th", undefined, NUMBERS.has(place) ? "" : "text"));
    head.appendChild(make("button", name)).onclick = () => sort(board, place);
    return head;
  });
  board.body = table.appendChild(make("tbody"));
  board.more = board.section.appendChild(make("button"));
  board.more.onclick = () => { board.limit += 5 * STEP; draw(board); };
}

boards.forEach(build);
for (const name of new Set(boards.map(board => board.task))) {
  task.append(make("option", name));
}
const redraw = () => boards.forEach(board => { board.limit = STEP; draw(board); });
for (const control of [filter, task, passed]) control.addEventListener("input", redraw);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
redraw();
